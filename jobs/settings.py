"""Settings of every role, read from ``REEL_*`` environment variables (and ``REEL_*_FILE`` secret files)."""

from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from jobs.quality import QUALITIES

Seconds = Annotated[float, Field(gt=0)]


class Settings(BaseSettings):
    """One flat, frozen set of settings; each role reads the part that it needs.

    A secret may also come from a file: ``REEL_SECRET_KEY_FILE=/run/secrets/key`` sets ``secret_key``.
    """

    model_config = SettingsConfigDict(env_prefix="REEL_", frozen=True, extra="ignore")

    start_seconds: float = Field(20.0, ge=0)  # how long a starting role waits for Redis, S3 and the bucket

    # Redis
    redis_url: str = "redis://127.0.0.1:6379/0"
    redis_timeout: Seconds = 5.0  # one command's connect and read timeout, seconds
    redis_wait_replicas: int = Field(0, ge=0)  # replicas that must hold a submit or an end before it counts
    redis_wait_ms: int = Field(1000, ge=1)  # how long to wait for them

    # S3-compatible storage
    s3_endpoint: str | None = None  # None: AWS
    s3_public_endpoint: str | None = None  # what clients reach; presigned URLs use it. None: s3_endpoint
    s3_bucket: str = "reelserve"
    s3_region: str = "us-east-1"
    s3_access_key: str | None = None  # None: boto3's own credential chain
    s3_secret_key: SecretStr | None = None
    presign_seconds: int = Field(900, ge=1, le=604_800)  # the page asks anew when one ran out

    # API
    api_host: str = "127.0.0.1"
    api_port: int = Field(8080, ge=0, le=65_535)
    public_url: str | None = None  # this API as clients see it; None: from the request
    secret_key: SecretStr | None = None  # hashes API keys, encrypts webhook secrets; nodes don't have it
    default_model: str | None = None  # None: the only registered model, else the request must name one
    max_body_bytes: int = Field(1_048_576, ge=1024)
    max_outstanding_per_key: int = Field(1000, ge=1)
    max_queued: int = Field(200_000, ge=1)
    idempotency_seconds: int = Field(86_400, ge=60)
    allow_loopback_callbacks: bool = False  # only the local stack sets it
    allowed_hosts: str = ""  # names, by comma, that may be inner addresses: for callbacks and image URLs
    rate_limit: int = Field(6000, ge=1)  # requests per key and window; the bucket's size as well
    rate_window_seconds: int = Field(60, ge=1)
    heartbeat_seconds: Seconds = 10.0  # event streams: a comment this often, below proxies' idle limits
    max_wait_seconds: int = Field(60, ge=0)  # the longest `Prefer: wait`
    max_upload_bytes: int = Field(20_971_520, ge=1024)  # an input image's file
    max_image_pixels: int = Field(33_554_432, ge=1024)  # width times height before it is decoded
    metrics_token: SecretStr | None = None  # None: /metrics is open, for a scraper inside the network

    # Jobs
    lease_seconds: Seconds = 15.0
    sweep_seconds: Seconds = 5.0
    max_attempts: int = Field(3, ge=1)
    aging_seconds: Seconds = 600.0  # a waiting job rises one priority level per this many seconds
    retention_seconds: int = Field(7 * 86_400, ge=60)  # terminal jobs and their videos
    webhook_progress_seconds: Seconds = 10.0  # at most one job.progress webhook a job per this many seconds

    # Webhooks
    webhook_timeout_seconds: Seconds = 15.0  # one attempt, from connecting to the answer's head
    # seconds until the next attempt, by attempts made; after the last of them comes the dead letter
    webhook_retry_seconds: tuple[Seconds, ...] = (5, 300, 1800, 7200, 18_000, 36_000, 50_400, 72_000, 86_400)

    # Node
    node_id: str | None = None  # None: host name plus a random suffix
    node_ranks: int = Field(0, ge=0)  # 0: one per visible GPU, or one on a CPU
    poll_seconds: Seconds = 1.0
    drain_seconds: Seconds = 600.0  # grace for the running job after SIGTERM
    spot_notice: Literal["aws", "gcp", "azure"] | None = None  # whose interruption notices a node watches for
    spot_notice_endpoint: str | None = None  # the metadata service; None: that cloud's own address
    spot_grace_seconds: Seconds = 20.0  # as drain_seconds, after such a notice (30 s on GCP and Azure)
    rank_timeout_seconds: Seconds = 30.0  # until the ranks of a node notice that one is dead or hangs
    step_timeout_seconds: Seconds = 600.0  # a rank silent for longer is taken for hung
    data_dir: Path = Path(".reel")
    # import path of the function that builds a rank's pipeline (its signature: worker.build.Builder)
    engine: str = "worker.build:build"
    node_price_per_hour: float = Field(0, ge=0)  # of the whole machine, in your currency; 0: unknown
    forbidden_presets: str = ""  # quality presets, by comma, that no request may name; nodes and API read it
    # "8bit": blocks in 8 bits are held in 8 bits alone, so the node refuses `lossless`, `draft` and LoRAs
    weights: Literal["full", "8bit"] = "full"
    lora_dir: Path | None = None  # LoRAs that requests may name; None: the checkpoint's own loras/
    verify_checkpoint: bool = False  # compare checksums before loading
    warm_up: bool = True  # run the served shapes once before the first job
    gpu_memory_gib: float | None = Field(None, gt=0)  # of one GPU that may be used; None: all that is free

    log_level: str = "INFO"

    @property
    def local_hosts(self) -> frozenset[str]:
        """The names in `allowed_hosts`, lower-case."""
        return frozenset(filter(None, (name.strip().lower() for name in self.allowed_hosts.split(","))))

    @property
    def forbidden(self) -> frozenset[str]:
        """The names in `forbidden_presets`."""
        return frozenset(filter(None, (name.strip() for name in self.forbidden_presets.split(","))))

    @field_validator("forbidden_presets")
    @classmethod
    def _known_presets(cls, value: str) -> str:
        unknown = sorted({name.strip() for name in value.split(",")} - {"", *QUALITIES})
        if unknown:
            raise ValueError(f"got {', '.join(unknown)}, expected some of {', '.join(QUALITIES)}")
        return value

    @model_validator(mode="before")
    @classmethod
    def _secrets_from_files(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Read ``REEL_<NAME>_FILE`` for the secrets, as container secrets are mounted."""
        import os

        for name in ("secret_key", "s3_secret_key", "redis_url", "metrics_token"):
            path = os.environ.get(f"REEL_{name.upper()}_FILE")
            if path and name not in values:
                values[name] = Path(path).read_text().strip()
        return values

    @field_validator("redis_url")
    @classmethod
    def _redis_scheme(cls, value: str) -> str:
        if not value.startswith(("redis://", "rediss://", "unix://")):
            raise ValueError(f"got {value!r}, expected redis://, rediss:// or unix://")
        return value


@lru_cache(maxsize=1)
def get_settings() -> Settings:
    """The process-wide settings, read once."""
    return Settings()

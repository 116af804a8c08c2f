"""What a job is: its states and legal transitions, the request, the record, and the model card.

Imports nothing of ours but `quality`. The Lua scripts enforce the same table (a test compares the two).
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from jobs.quality import LOSSLESS, PresetCard

SCHEMA = 3  # rises when an older node could not run a newer job; a node leaves newer ones in the queue
# Request fields that came after schema 1, and the schema that a node must know to run them. Unused ones are
# not stored, since a node refuses fields that it doesn't know: so an older one still runs what it can.
LATER = {"loras": 2, "quality": 3}


class JobState(StrEnum):
    """The six states a client sees."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELED = "canceled"
    EXPIRED = "expired"


S = JobState
TRANSITIONS: Mapping[JobState, frozenset[JobState]] = {
    S.QUEUED: frozenset({S.RUNNING, S.CANCELED, S.EXPIRED, S.FAILED}),
    # back to queued: a failed attempt with tries left, a lost lease, or a draining node giving it back
    S.RUNNING: frozenset({S.QUEUED, S.SUCCEEDED, S.FAILED, S.CANCELED}),
    S.SUCCEEDED: frozenset(),
    S.FAILED: frozenset({S.QUEUED}),  # only by an operator's replay of the dead letter
    S.CANCELED: frozenset(),
    S.EXPIRED: frozenset(),
}
TERMINAL = frozenset({S.SUCCEEDED, S.FAILED, S.CANCELED, S.EXPIRED})


class Priority(StrEnum):
    """Lanes are strict by priority, with ageing."""

    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"


class Phase(StrEnum):
    """What a running job is doing."""

    ENCODING = "encoding"  # the prompt
    DENOISING = "denoising"
    DECODING = "decoding"  # latents to frames to MP4
    PUBLISHING = "publishing"  # upload; the GPUs are already free


class FailureClass(StrEnum):
    """Decides whether a failed attempt is tried again."""

    USER = "user"  # the request's fault: never retried
    OUT_OF_MEMORY = "out_of_memory"  # once more, on a fresh group
    INFRASTRUCTURE = "infrastructure"  # up to max_attempts
    LOST = "lost"  # the lease expired: the node died or froze; counts like infrastructure


class WebhookEvent(StrEnum):
    """The events that a callback can ask for."""

    STARTED = "job.started"
    PROGRESS = "job.progress"
    SUCCEEDED = "job.succeeded"
    FAILED = "job.failed"
    CANCELED = "job.canceled"
    EXPIRED = "job.expired"


DEFAULT_WEBHOOK_EVENTS = (
    WebhookEvent.SUCCEEDED,
    WebhookEvent.FAILED,
    WebhookEvent.CANCELED,
    WebhookEvent.EXPIRED,
)

SampleSolver = Literal["unipc", "dpm++"]
GuidePair = tuple[float, float]  # (low-noise expert, high-noise expert)


class Lora(BaseModel):
    """A LoRA of the model's LoRA folder, for one expert or both."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(max_length=128, description="As `GET /v1/models` lists it.")]
    strength: Annotated[float, Field(strict=True, ge=-10, le=10, description="1.0: as it was trained.")] = 1.0
    expert: Annotated[
        Literal["both", "high", "low"],
        Field(description="The high-noise expert, the low-noise one, or both."),
    ] = "both"


class VideoRequest(BaseModel):
    """A request with every default filled in: enough, with the model, to make the same video again."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: Annotated[str, Field(min_length=1, max_length=2000)]
    negative_prompt: str = ""  # "" means the model's own
    model: str
    size: str  # "W*H", pixels
    frame_num: int  # 4n+1
    shift: float
    sampling_steps: int
    guide_scale: GuidePair
    seed: int
    sample_solver: SampleSolver
    image: str | None = None  # storage key of the input image
    loras: tuple[Lora, ...] = ()
    quality: str = LOSSLESS  # a preset of the model's card


class JobError(BaseModel):
    """Why a job failed: an RFC 9457 problem's members, plus the failure class."""

    type: str  # stable slug, such as "out-of-memory"
    title: str
    detail: str
    failure_class: FailureClass = FailureClass.INFRASTRUCTURE


class VideoResult(BaseModel):
    """What a finished attempt committed."""

    video_key: str
    poster_key: str
    manifest_key: str
    width: int
    height: int
    frames: int
    fps: float
    bytes: int
    sha256: str  # of the MP4
    seconds: dict[str, float] = Field(default_factory=dict)  # phase to wall seconds; publishing: the upload
    device: str = ""  # what it was made on, such as "NVIDIA H200"
    gpus: int = 0  # how many of them; on a CPU, processes
    gpu_seconds: float | None = None  # GPUs times the seconds that this attempt held them
    quality: str = LOSSLESS  # the preset it was made with
    steps_computed: int | None = None  # denoising steps whose blocks ran; None: made by an older node
    steps_reused: int = 0  # steps that took an earlier one's result
    guidance_reused: int = 0  # computed steps without their unconditional pass
    attention_reused: int = 0  # computed steps that took an earlier one's self-attention
    cost: float | None = None  # those seconds at the node's price (REEL_NODE_PRICE_PER_HOUR), if it has one


class Job(BaseModel):
    """The record as stored in Redis. Times are Unix seconds by the Redis clock."""

    id: str
    schema_: int = Field(SCHEMA, alias="schema")
    key_id: str
    state: JobState
    priority: Priority = Priority.NORMAL
    request: VideoRequest
    created_at: float
    queued_at: float
    started_at: float | None = None
    finished_at: float | None = None
    deadline_at: float | None = None  # a job not started by then expires
    attempts: int = 0  # charged failures only; a job given back keeps its count
    token: int = 0  # rises at every claim; a stale owner's writes are refused
    owner: str | None = None  # node id
    lease_until: float | None = None
    cancel_requested: bool = False
    phase: Phase | None = None
    step: int = 0
    progress: float = Field(0.0, ge=0, le=1)
    eta_seconds: float | None = None
    error: JobError | None = None
    result: VideoResult | None = None
    callback_url: str | None = None
    webhook_events: tuple[WebhookEvent, ...] = DEFAULT_WEBHOOK_EVENTS
    metadata: dict[str, str] = Field(default_factory=dict)
    version: int = 1  # rises at every write; the ETag

    model_config = ConfigDict(populate_by_name=True)

    @property
    def terminal(self) -> bool:
        """Whether the job has ended."""
        return self.state in TERMINAL


class NewJob(BaseModel):
    """What the API hands to the store: validated, defaults filled in, not yet accepted."""

    id: str
    key_id: str
    priority: Priority = Priority.NORMAL
    request: VideoRequest
    deadline_seconds: float | None = None
    callback_url: str | None = None
    webhook_events: tuple[WebhookEvent, ...] = DEFAULT_WEBHOOK_EVENTS
    metadata: dict[str, str] = Field(default_factory=dict)
    idempotency_key: str | None = None
    body_hash: str = ""  # of the client's body, compared when the Idempotency-Key repeats
    max_outstanding: int | None = None  # the API key's own limit; None: the settings' limit


class ModelCard(BaseModel):
    """What a node says of the model it serves; the API validates requests against it."""

    name: str
    task: Literal["t2v", "i2v", "ti2v"]
    sizes: list[str]  # "W*H"
    fps: float
    default_size: str
    default_frame_num: int
    max_frame_num: int
    default_shift: float
    default_sampling_steps: int
    max_sampling_steps: int = 100
    default_guide_scale: GuidePair
    sample_solvers: list[SampleSolver] = ["unipc", "dpm++"]
    loras: list[str] = []  # names of the LoRAs that requests may use
    presets: list[PresetCard] = []  # refused ones too, with the reason; empty: lossless alone
    size_multiple: int = 16  # pixels; a size not listed is refused whatever its divisibility
    schema_: int = Field(SCHEMA, alias="schema")

    model_config = ConfigDict(populate_by_name=True)


def jsonable(model: BaseModel) -> dict[str, Any]:
    """The model as JSON types, with stored names (``schema``, not ``schema_``)."""
    return model.model_dump(mode="json", by_alias=True)

"""What the API answers with, as OpenAPI documents it. (What it takes is in `api.inputs`.)"""

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from jobs.job import FailureClass, GuidePair, JobState, Lora, Phase, Priority, SampleSolver, WebhookEvent

JOB_ID = "job_0m7f3c2k9x1v5n8p4q6r7s2t1"
TIME = "2026-11-24T09:30:00Z"
Timestamp = Annotated[datetime, Field(examples=[TIME])]


class RequestOut(BaseModel):
    """The request as it will be run: what was sent, with every default filled in."""

    prompt: str = Field(examples=["A red fox trots through fresh snow at dawn, soft light, slow pan"])
    negative_prompt: str = Field(description="Empty: the model's own default.", examples=[""])
    model: str = Field(examples=["wan2.2-t2v-a14b"])
    size: str = Field(description="Width*height in pixels.", examples=["1280*720"])
    frame_num: int = Field(description="Frames, 4n+1.", examples=[81])
    shift: float = Field(description="Schedule shift.", examples=[12.0])
    sampling_steps: int = Field(examples=[40])
    guide_scale: GuidePair = Field(
        description="Guidance of the low-noise, then of the high-noise expert.", examples=[[3.0, 4.0]]
    )
    seed: int = Field(description="Chosen at random when none was sent.", examples=[42])
    sample_solver: SampleSolver = Field(examples=["unipc"])
    image: str | None = Field(description="The upload that the video starts from.", examples=[None])
    loras: list[Lora] = Field(description="Merged into the model for this video.", examples=[[]])
    quality: str = Field(description="The preset; `lossless` unless asked for.", examples=["lossless"])


class ErrorOut(BaseModel):
    """Why a job failed, as a problem."""

    type: str = Field(description="Stable slug.", examples=["out-of-memory"])
    title: str = Field(examples=["The GPUs ran out of memory"])
    detail: str = Field(examples=["Try fewer frames or a smaller size."])
    failure_class: FailureClass


class ResultOut(BaseModel):
    """The finished video."""

    width: int = Field(examples=[1280])
    height: int = Field(examples=[720])
    frames: int = Field(examples=[81])
    fps: float = Field(examples=[16.0])
    bytes: int = Field(description="Size of the MP4.", examples=[4_194_304])
    sha256: str = Field(description="Of the MP4.", examples=["9f86d081884c7d659a2feaa0c55ad015" + "0" * 32])
    seconds: dict[str, float] = Field(
        description="Wall seconds of each phase.", examples=[{"encoding": 0.4, "denoising": 50.2}]
    )
    gpu_seconds: float | None = Field(
        None, description="GPUs times the seconds that the video held them.", examples=[416.0]
    )

    quality: str = Field("lossless", description="The preset it was made with.", examples=["8bit-cache"])
    steps_computed: int | None = Field(None, description="Denoising steps that were computed.", examples=[28])
    steps_reused: int = Field(0, description="Steps that took an earlier step's result.", examples=[12])
    guidance_reused: int = Field(
        0, description="Computed steps that took an earlier step's guidance.", examples=[4]
    )
    attention_reused: int = Field(
        0, description="Computed steps that took an earlier step's self-attention.", examples=[6]
    )


class Links(BaseModel):
    """Where to go from here. Absolute URLs; the same bearer key opens them."""

    self: str = Field(examples=[f"https://reel.example/v1/jobs/{JOB_ID}"])
    events: str = Field(description="Server-sent events.")
    cancel: str = Field(description="POST here to cancel.")
    video: str = Field(description="302 to the MP4 once the job has succeeded; 409 before.")
    poster: str = Field(description="302 to a JPEG of the first frame.")
    webhooks: str = Field(description="The job's webhook deliveries.")


class JobOut(BaseModel):
    """A job."""

    id: str = Field(examples=[JOB_ID])
    state: JobState = Field(description="`queued` and `running` change; the other four are final.")
    progress: float = Field(ge=0, le=1, description="0 to 1; 1 when succeeded.", examples=[0.35])
    phase: Phase | None = Field(description="What a running job is doing.", examples=["denoising"])
    step: int = Field(description="Denoising step reached, of `request.sampling_steps`.", examples=[14])
    eta_seconds: float | None = Field(
        description="Estimated seconds to the end of the run, while running: from the job's own steps, and "
        "before its first one from earlier videos of its shape. `null` when nothing honest can be said, as "
        "while a service's first video is denoised: no decode was timed yet.",
        examples=[32.5],
    )
    queue_position: int | None = Field(
        description="Jobs ahead of this one, 0 = next; approximate across keys. `null` unless queued.",
        examples=[None],
    )
    estimated_start_at: Timestamp | None = Field(
        description="When it will probably start, while queued: from what runs, what waits before it and how "
        "long videos took. `null` when nothing honest can be said."
    )
    attempts: int = Field(description="Failed tries so far (a node that drains costs none).", examples=[0])
    cancel_requested: bool = Field(description="A cancel is on its way to the node.", examples=[False])
    model: str = Field(examples=["wan2.2-t2v-a14b"])
    priority: Priority
    request: RequestOut
    result: ResultOut | None = Field(description="Set when succeeded.")
    error: ErrorOut | None = Field(description="Set when failed.")
    metadata: dict[str, str] = Field(description="As sent.", examples=[{"ref": "order-1001"}])
    callback_url: str | None = Field(examples=["https://example.com/hooks/reel"])
    webhook_events: list[WebhookEvent]
    created_at: Timestamp
    started_at: Timestamp | None
    finished_at: Timestamp | None
    deadline_at: Timestamp | None = Field(description="Not started by then: `expired`.")
    links: Links


class JobPage(BaseModel):
    """One page of jobs, newest first."""

    data: list[JobOut]
    has_more: bool
    next_cursor: str | None = Field(
        description="Pass as `cursor` for the next page; opaque.", examples=["MTc2MzkzMDAwMA"]
    )


class SignedUrl(BaseModel):
    """A short-lived address of one object; whoever has it may read that object."""

    url: str = Field(examples=["https://s3.example/reelserve/jobs/...?X-Amz-Signature=..."])
    expires_at: Timestamp


class UploadOut(BaseModel):
    """A stored input image, checked and written anew without its metadata."""

    id: str = Field(description="Send as `image` of a job.", examples=["img_0m7f3c2k9x1v5n8p4q6r7s2t1"])
    width: int = Field(examples=[1280])
    height: int = Field(examples=[720])
    bytes: int = Field(examples=[1_048_576])
    content_type: str = Field(examples=["image/png"])


class PresetOut(BaseModel):
    """A quality preset of a model."""

    name: str = Field(description="Send as `quality`.", examples=["8bit"])
    summary: str = Field(examples=["matrix products and self-attention of most blocks in 8 bits"])
    offered: bool = Field(description="Requests may name it.")
    reason: str | None = Field(description="Why they may not.", examples=[None])
    expected_seconds: float | None = Field(
        description="On the GPUs for the model's defaults, learned from finished videos; `null` before one.",
        examples=[61.5],
    )
    defaults: dict[str, Any] = Field(
        description="What it changes of the model's defaults.", examples=[{"sampling_steps": 4}]
    )


class ModelOut(BaseModel):
    """A model that nodes serve: what it takes and what it does when a field is left out."""

    id: str = Field(description="Send as `model`.", examples=["wan2.2-t2v-a14b"])
    object: Literal["model"] = "model"
    task: Literal["t2v", "i2v", "ti2v"] = Field(
        description="t2v: text; i2v: needs an image; ti2v: text, and an image if you like."
    )
    live: bool = Field(description="A live node serves it now; if not, jobs wait for one.")
    sizes: list[str] = Field(examples=[["1280*720", "720*1280", "832*480", "480*832"]])
    fps: float = Field(examples=[16.0])
    max_frame_num: int = Field(examples=[121])
    max_sampling_steps: int = Field(examples=[100])
    sample_solvers: list[SampleSolver] = Field(examples=[["unipc", "dpm++"]])
    loras: list[str] = Field(description="Names that `loras` may give.", examples=[["four-step-high"]])
    presets: list[PresetOut] = Field(description="Quality presets; `lossless` is the default.")
    defaults: dict[str, Any] = Field(
        description="The value of each field that a request leaves out.",
        examples=[{"size": "1280*720", "frame_num": 81, "sampling_steps": 40, "guide_scale": [3.0, 4.0]}],
    )


class ModelList(BaseModel):
    """All models."""

    object: Literal["list"] = "list"
    data: list[ModelOut]


class NodeOut(BaseModel):
    """A node, as it last reported."""

    id: str = Field(examples=["gpu-host-1-7f3a"])
    state: Literal["starting", "idle", "busy", "draining", "stopped"]
    live: bool = Field(description="It reported within a lease's time.")
    model: str = Field(examples=["wan2.2-t2v-a14b"])
    ranks: int = Field(description="GPUs (or CPU processes) that work on one video together.", examples=[8])
    layout: str = Field(description="Guidance x Ulysses.", examples=["2x4"])
    host: str = Field(examples=["gpu-host-1"])
    device: str = Field(examples=["NVIDIA H100 80GB HBM3"])
    version: str = Field(examples=["0.1.0"])
    job_id: str | None = Field(description="The job on its GPUs.", examples=[JOB_ID])
    publishing_job_id: str | None = Field(description="The job that it encodes and uploads.")
    draining: bool = Field(description="It takes nothing new.")
    progress: float | None = Field(description="Of the job on its GPUs, 0 to 1.", examples=[0.35])
    memory_used: int | None = Field(
        description="Bytes over its GPUs (on a CPU node: resident bytes of its ranks).",
        examples=[75_161_927_680],
    )
    memory_total: int | None = Field(examples=[687_194_767_360])
    step_seconds: float | None = Field(
        description="One denoising step of the last video it finished.", examples=[1.24]
    )
    started_at: Timestamp
    seen_at: Timestamp
    labels: dict[str, str] = Field(description="Cloud, region and the like.", examples=[{"cloud": "aws"}])


class NodeList(BaseModel):
    """All nodes that reported lately."""

    data: list[NodeOut]


class KeyOut(BaseModel):
    """The key that asks."""

    id: str = Field(examples=["key_0m7f3c2k9x1v5n8p4q6r7s2t1"])
    name: str = Field(examples=["laptop"])
    scopes: list[str] = Field(examples=[["read", "submit"]])


class Check(BaseModel):
    """One dependency's answer."""

    ok: bool
    detail: str = Field(examples=["answered in 1 ms"])


class Health(BaseModel):
    """The process answers."""

    status: Literal["ok"] = "ok"


class Ready(BaseModel):
    """Whether a job would run, and if not what is missing."""

    ready: bool
    missing: list[str] = Field(description="The dependencies that are not ok.", examples=[[]])
    checks: dict[str, Check]

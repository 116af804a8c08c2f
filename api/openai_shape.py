"""Between our jobs and OpenAI's video objects (as in the `openai` package 3.54): names, units, states."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from pydantic import BaseModel, Field

from api.errors import invalid
from api.problem import shorten
from api.schemas import JOB_ID
from jobs.errors import FieldProblem
from jobs.job import Job, JobState, ModelCard
from jobs.requests import SHIFT_MIN

STATUS: Mapping[JobState, Literal["queued", "in_progress", "completed", "failed"]] = {
    JobState.QUEUED: "queued",
    JobState.RUNNING: "in_progress",
    JobState.SUCCEEDED: "completed",
    JobState.FAILED: "failed",
    JobState.CANCELED: "failed",  # their shape has no such states: `error.code` tells them apart
    JobState.EXPIRED: "failed",
}
ENDED = {
    JobState.CANCELED: ("canceled", "The job was canceled."),
    JobState.EXPIRED: ("expired", "The job was not started by its deadline."),
}
NATIVE_NAMES = {"frame_num": "seconds", "image": "input_reference"}  # ours to theirs, in errors
NUMBERS: Mapping[str, Callable[[str], int | float]] = {
    "seed": int,
    "sampling_steps": int,
    "shift": float,
    "guide_scale": float,
}
TEXTS = ("negative_prompt", "sample_solver")
KNOWN = ("prompt", "model", "size", "seconds", "input_reference", *NUMBERS, *TEXTS)


class VideoErrorOut(BaseModel):
    """Why a video failed."""

    code: str = Field(examples=["out-of-memory"])
    message: str = Field(examples=["The GPUs ran out of memory"])


class VideoOut(BaseModel):
    """OpenAI's video object."""

    id: str = Field(examples=[JOB_ID])
    object: Literal["video"] = "video"
    model: str = Field(examples=["wan2.2-t2v-a14b"])
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: int = Field(ge=0, le=100, examples=[35])
    created_at: int = Field(description="Unix seconds.", examples=[1_763_976_600])
    completed_at: int | None = Field(examples=[None])
    expires_at: int | None = Field(description="When the video will be removed.", examples=[None])
    prompt: str
    seconds: str = Field(examples=["5.06"])
    size: str = Field(examples=["1280x720"])
    error: VideoErrorOut | None
    remixed_from_video_id: None = None


class VideoPage(BaseModel):
    """OpenAI's cursor page."""

    object: Literal["list"] = "list"
    data: list[VideoOut]
    first_id: str | None
    last_id: str | None
    has_more: bool


class VideoDeleted(BaseModel):
    """OpenAI's answer to a delete."""

    id: str = Field(examples=[JOB_ID])
    object: Literal["video.deleted"] = "video.deleted"
    deleted: bool = True


_FIELDS: dict[str, Any] = {
    "prompt": {"type": "string", "minLength": 1, "maxLength": 2000},
    "model": {"type": "string", "examples": ["wan2.2-t2v-a14b"]},
    "seconds": {"type": "string", "examples": ["5"], "description": "Rounded to 4n+1 frames."},
    "size": {"type": "string", "pattern": r"^\d+x\d+$", "examples": ["1280x720"]},
    "input_reference": {
        "type": "string",
        "format": "binary",
        "description": "First image.",
    },
    "seed": {"type": "integer", "minimum": 0},
    "negative_prompt": {"type": "string", "maxLength": 2000},
    "sampling_steps": {"type": "integer", "minimum": 1},
    "guide_scale": {"type": "number", "minimum": 0, "maximum": 100},
    "shift": {"type": "number", "minimum": SHIFT_MIN, "maximum": 100},
    "sample_solver": {"enum": ["unipc", "dpm++"]},
}
_SCHEMA = {"type": "object", "required": ["prompt"], "properties": _FIELDS, "additionalProperties": False}
_REFERENCE = {"type": "string", "description": "First image: an upload's id, or an https URL."}
_TEXTS = {**_SCHEMA, "properties": {**_FIELDS, "input_reference": _REFERENCE}}
BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {"schema": _SCHEMA},
            "application/json": {"schema": _TEXTS},
            "application/x-www-form-urlencoded": {"schema": _TEXTS},
        },
    }
}


def native_body(fields: Mapping[str, Any], card: ModelCard) -> dict[str, Any]:
    """The native body for a façade request. Raises ProblemError with all that can't be read."""
    wrong: list[FieldProblem] = []
    body: dict[str, Any] = {"model": card.name}
    for name, value in fields.items():
        if name not in KNOWN:
            known = "no such field; known are " + ", ".join(KNOWN)
            wrong.append(FieldProblem(shorten(name), shorten(value), known))
        elif value in (None, ""):
            continue
        elif name == "size":
            body["size"] = str(value).replace("x", "*")
        elif name == "seconds":
            _seconds(value, card, body, wrong)
        elif name == "input_reference":
            body["image"] = value
        elif name in NUMBERS and isinstance(value, str):
            _number(name, value, body, wrong)
        elif name != "model":
            body[name] = value
    if wrong:
        raise invalid(wrong)
    return body


def _seconds(value: Any, card: ModelCard, body: dict[str, Any], wrong: list[FieldProblem]) -> None:
    """frames = 4*round(s*fps/4)+1, which must fit the model."""
    longest = (card.max_frame_num - 1) / card.fps
    expected = f'a text such as "4", above 0 and at most {longest:g}'
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = math.nan
    frames = 4 * round(seconds * card.fps / 4) + 1 if math.isfinite(seconds) and abs(seconds) < 1e6 else 0
    if seconds <= 0 or not 1 <= frames <= card.max_frame_num:
        wrong.append(FieldProblem("seconds", shorten(value), expected))
    else:
        body["frame_num"] = frames


def _number(name: str, value: str, body: dict[str, Any], wrong: list[FieldProblem]) -> None:
    """A number that came as a form's text."""
    try:
        number = NUMBERS[name](value)
    except ValueError:
        wrong.append(FieldProblem(name, shorten(value), f"a number ({NUMBERS[name].__name__})"))
    else:
        body[name] = number


def renamed(problems: Iterable[FieldProblem]) -> list[FieldProblem]:
    """Problems with their fields and sizes as the façade's caller knows them."""
    return [
        FieldProblem(
            NATIVE_NAMES.get(item.field, item.field),
            item.got.replace("*", "x") if item.field == "size" else item.got,
            item.expected.replace("*", "x") if item.field == "size" else item.expected,
        )
        for item in problems
    ]


def video_view(job: Job, fps: float, retention_seconds: int) -> VideoOut:
    """A job as OpenAI's video object. fps: of the job's model, unless its result says."""
    error = None
    if job.state in ENDED:
        code, message = ENDED[job.state]
        error = VideoErrorOut(code=code, message=message)
    elif job.error is not None:
        error = VideoErrorOut(code=job.error.type, message=f"{job.error.title}: {job.error.detail}")
    ended = job.finished_at is not None and job.terminal
    done = job.state is JobState.SUCCEEDED
    return VideoOut(
        id=job.id,
        model=job.request.model,
        status=STATUS[job.state],
        progress=100 if done else min(99, int(job.progress * 100)),
        created_at=int(job.created_at),
        completed_at=int(job.finished_at) if done and job.finished_at else None,
        expires_at=int(job.finished_at + retention_seconds) if ended and job.finished_at else None,
        prompt=job.request.prompt,
        seconds=_length(job.request.frame_num, job.result.fps if job.result else fps),
        size=job.request.size.replace("*", "x"),
        error=error,
    )


def _length(frames: int, fps: float) -> str:
    """The clip's length in seconds: (frames - 1) / fps, so that "4" comes back as "4"."""
    return f"{round((frames - 1) / fps, 2):g}"

"""Small builders for job tests of every room."""

from typing import Any

from jobs.ids import new_id
from jobs.job import ModelCard, NewJob, VideoRequest, VideoResult


def card(**changes: Any) -> ModelCard:
    """A model card as a tiny node would publish it."""
    fields: dict[str, Any] = {
        "name": "tiny",
        "task": "t2v",
        "sizes": ["64*48", "128*96"],
        "fps": 16.0,
        "default_size": "64*48",
        "default_frame_num": 5,
        "max_frame_num": 81,
        "default_shift": 5.0,
        "default_sampling_steps": 4,
        "default_guide_scale": (3.0, 4.0),
    }
    return ModelCard(**{**fields, **changes})


def video_request(**changes: Any) -> VideoRequest:
    """A resolved request that the tiny card allows."""
    fields: dict[str, Any] = {
        "prompt": "a red ball rolls over a table",
        "model": "tiny",
        "size": "64*48",
        "frame_num": 5,
        "shift": 5.0,
        "sampling_steps": 4,
        "guide_scale": (3.0, 4.0),
        "seed": 7,
        "sample_solver": "unipc",
    }
    return VideoRequest(**{**fields, **changes})


def new_job(key: str = "key_a", **changes: Any) -> NewJob:
    """A new job; `model` goes into its request."""
    model = changes.pop("model", "tiny")
    return NewJob(**{"id": new_id("job"), "key_id": key, "request": video_request(model=model), **changes})


def result(job_id: str = "job_x", token: int = 1) -> VideoResult:
    """A committed result."""
    folder = f"jobs/{job_id}/{token}"
    return VideoResult(
        video_key=f"{folder}/video.mp4",
        poster_key=f"{folder}/poster.jpg",
        manifest_key=f"{folder}/manifest.json",
        width=64,
        height=48,
        frames=5,
        fps=16.0,
        bytes=1234,
        sha256="0" * 64,
        seconds={"denoising": 1.5},
    )

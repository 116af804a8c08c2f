"""The JSON beside each video: everything needed to make it again."""

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from engine.config import ModelSpec
from engine.parallel.mesh import Mesh
from jobs.job import Job, jsonable
from worker.plan import NodePlan

PACKAGES = ("reelserve", "torch", "transformers", "triton", "numpy", "ray")


def manifest_of(
    job: Job, spec: ModelSpec, mesh: Mesh, plan: NodePlan, seconds: dict[str, float]
) -> dict[str, Any]:
    """Request, model, versions, layout and timings (seconds per phase) of one finished attempt."""
    return {
        "schema": 1,
        "job": job.id,
        "token": job.token,
        "attempts": job.attempts,
        "request": jsonable(job.request),
        "model": {
            "name": spec.name,
            "task": spec.task,
            "folder": plan.model.name,
            "boundary": spec.boundary,
            "fps": spec.fps,
        },
        "layout": {"ranks": mesh.size, "guidance": mesh.guidance, "ulysses": mesh.ulysses},
        "device": torch.cuda.get_device_name() if plan.device == "cuda" else platform.machine(),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "node": plan.node_id,
        "seconds": seconds,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None

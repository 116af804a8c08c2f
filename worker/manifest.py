"""The JSON beside each video: everything needed to make it again."""

import platform
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from engine.config import ModelSpec, Work
from jobs.job import Job, jsonable
from worker.build import Ranks
from worker.plan import NodePlan

PACKAGES = ("reelserve", "torch", "transformers", "triton", "numpy", "ray")


def manifest_of(
    job: Job, spec: ModelSpec, mesh: Ranks, plan: NodePlan, seconds: dict[str, float], work: Work
) -> dict[str, Any]:
    """Request, model, versions, layout, timings (seconds per phase) and work of one finished attempt."""
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
        "work": asdict(work),
        "layout": {"ranks": mesh.size, "guidance": mesh.guidance, "ulysses": mesh.ulysses},
        "device": _device(plan),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "node": plan.node_id,
        "seconds": seconds,
    }


def _device(plan: NodePlan) -> str:
    if plan.device == "cuda":
        import torch

        return str(torch.cuda.get_device_name())
    return platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None

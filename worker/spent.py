"""What a finished attempt used: GPU-seconds and, where the node has a price, money."""

from typing import Any, TypedDict

from jobs.job import Phase
from worker.video import VideoFacts


class Spent(TypedDict):
    """The fields of a VideoResult that say so."""

    device: str
    gpus: int
    gpu_seconds: float
    cost: float | None


def spent(facts: VideoFacts, price_per_hour: float) -> Spent:
    """GPUs times seconds from the prompt's encoding to the last decoded frame; uploads hold no GPU.

    price_per_hour: of the whole node, all its GPUs; 0 when it is not known.
    """
    layout: Any = facts.manifest.get("layout") or {}
    gpus = int(layout.get("ranks", 1))
    seconds = sum(wall for phase, wall in facts.seconds.items() if phase != Phase.PUBLISHING)
    return Spent(
        device=str(facts.manifest.get("device", "")),
        gpus=gpus,
        gpu_seconds=round(gpus * seconds, 3),
        cost=round(seconds * price_per_hour / 3600, 6) if price_per_hour else None,
    )

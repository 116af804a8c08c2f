"""What comes in: arrival rates by the hour, shapes of videos, keys and priorities. Seeded."""

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from jobs.job import NewJob, Priority, VideoRequest

HOUR = 3600.0
DAY = 24 * HOUR
Rate = Callable[[float], float]  # Unix-like seconds to jobs a second


@dataclass(frozen=True)
class Shape:
    """One kind of video. seconds: on one 8-GPU node, from claim to free GPUs. share: of all jobs."""

    size: str
    frame_num: int
    steps: int
    seconds: float
    share: float


# Inputs, not claims: one 720p video in 110 s and one of 480p in 30 s on a node of 8 H100.
SHAPES = (Shape("1280*720", 81, 40, 110.0, 0.6), Shape("832*480", 81, 40, 30.0, 0.4))
MEAN = sum(shape.seconds * shape.share for shape in SHAPES)
NOISE = 0.03  # of a job's seconds, normal
PRIORITIES = ((Priority.HIGH, 0.1), (Priority.NORMAL, 0.8), (Priority.LOW, 0.1))
KEYS = 20  # customers; the first sends a third of all jobs


@dataclass(frozen=True)
class Arrival:
    """One job to come. seconds: what it will take."""

    at: float
    job: NewJob
    seconds: float


def diurnal(nodes: float, swing: float = 0.7) -> Rate:
    """Work for `nodes` nodes on average, least at midnight, most at noon."""
    return lambda t: nodes / MEAN * (1 - swing * math.cos(2 * math.pi * t / DAY))


def spike(base: Rate, start: float, end: float, factor: float) -> Rate:
    """`factor` times the load between two times."""
    return lambda t: base(t) * (factor if start <= t < end else 1)


def arrivals(rate: Rate, peak: float, until: float, rng: random.Random, model: str) -> Iterator[Arrival]:
    """A Poisson process of changing rate, by thinning (P. Lewis, G. Shedler, 1979). peak: no less than any
    rate.
    """
    now, number = 0.0, 0
    while (now := now + rng.expovariate(peak)) < until:
        if rng.random() * peak < rate(now):
            number += 1
            shape = rng.choices(SHAPES, [s.share for s in SHAPES])[0]
            yield Arrival(now, _job(number, shape, rng, model), shape.seconds * max(0.5, rng.gauss(1, NOISE)))


def _job(number: int, shape: Shape, rng: random.Random, model: str) -> NewJob:
    key = 0 if rng.random() < 1 / 3 else rng.randrange(1, KEYS)
    request = VideoRequest(
        prompt="x",
        model=model,
        size=shape.size,
        frame_num=shape.frame_num,
        shift=5.0,
        sampling_steps=shape.steps,
        guide_scale=(3.0, 4.0),
        seed=0,
        sample_solver="unipc",
    )
    priority = rng.choices([p for p, _ in PRIORITIES], [share for _, share in PRIORITIES])[0]
    return NewJob(id=f"job_{number:025d}", key_id=f"key_{key}", priority=priority, request=request)

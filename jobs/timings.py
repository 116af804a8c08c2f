"""How long videos take, learned from those that were made: by model and shape, shared by all nodes."""

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from jobs.client import RedisClient, guard
from jobs.errors import StoreUnavailable
from jobs.job import VideoRequest
from jobs.quality import LOSSLESS
from jobs.scripts import PREFIX

WEIGHT = 0.3  # of a new measurement in the running average: the last handful of videos count
SHAPES_CAP = 256  # shapes remembered a model; all sizes and lengths of the family are fewer
ANY = "*"  # the field of the model's average job, whatever its shape


@dataclass(frozen=True)
class Durations:
    """What is known of one model. Seconds of GPU work; publishing overlaps the next job and is left out."""

    shapes: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # shape to (a step, the rest)
    mean: float | None = None  # of a job, of any shape

    def expect(self, request: VideoRequest) -> float | None:
        """Seconds that this request will take; None when no video of its shape was made lately."""
        known = self.shapes.get(shape_of(request))
        return None if known is None else known[0] * request.sampling_steps + known[1]


class Timings:
    """The averages in Redis. A lost update costs one sample, so there is no script."""

    def __init__(self, redis: RedisClient) -> None:
        self.redis = redis

    def learn(self, request: VideoRequest, seconds: Mapping[str, float]) -> None:
        """Take in a finished video: wall seconds by phase. Redis being away is no error here."""
        denoising, total = seconds.get("denoising"), sum(seconds.values())
        if not denoising or request.sampling_steps < 1:
            return
        with contextlib.suppress(StoreUnavailable):
            known = self.of(request.model)
            shape = shape_of(request)
            step, rest = denoising / request.sampling_steps, total - denoising
            before = known.shapes.get(shape, (step, rest))
            fields = [ANY, json.dumps(_blend(known.mean or total, total))]
            if shape in known.shapes or len(known.shapes) < SHAPES_CAP:
                fields += [shape, json.dumps([_blend(before[0], step), _blend(before[1], rest)])]
            with guard():
                self.redis.execute_command("HSET", f"{PREFIX}timings:{request.model}", *fields)

    def of(self, model: str) -> Durations:
        """All that is known of a model."""
        with guard():
            stored = self.redis.execute_command("HGETALL", f"{PREFIX}timings:{model}")
        values = {name: json.loads(text) for name, text in stored.items()}
        mean = values.pop(ANY, None)
        return Durations({name: (float(step), float(rest)) for name, (step, rest) in values.items()}, mean)


def shape_of(request: VideoRequest) -> str:
    """What decides the time of a step and of a decode: width, height, frames, and the preset if any."""
    preset = "" if request.quality == LOSSLESS else f":{request.quality}"
    return f"{request.size}:{request.frame_num}{preset}"


def _blend(before: float, now: float) -> float:
    return round(before + WEIGHT * (now - before), 6)

"""What ranks tell their node. No torch in here: the node's other processes do without it."""

from dataclasses import dataclass
from typing import Literal

from engine.config import ModelSpec
from jobs.job import FailureClass

Stop = Literal["cancel", "lease_lost", "drain"]


class BadModel(Exception):
    """The checkpoint or the plan can't work, on any try; the message is for the operator."""


@dataclass(frozen=True)
class RankReport:
    """How one rank's part of an attempt ended."""

    rank: int
    outcome: Literal["done", "stopped", "failed"]
    stop: Stop | None = None  # why it stopped (rank 0 knows)
    failure: FailureClass = FailureClass.INFRASTRUCTURE
    detail: str = ""
    began_at: float = (
        0.0  # entering and leaving the engine; time.monotonic(), one clock for the whole machine
    )
    ended_at: float = 0.0


@dataclass(frozen=True)
class Loaded:
    """A rank that is ready."""

    spec: ModelSpec
    pid: int

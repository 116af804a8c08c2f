"""The rank actor: `worker.rank.Rank` behind Ray, so that nobody but a rank's own process imports torch."""

from pathlib import Path
from typing import Any

import ray

from engine.config import GenerationRequest
from jobs.job import Job
from worker.logs import join_logs
from worker.plan import NodePlan
from worker.reports import Loaded, RankReport, Stop

SIDE = "side"  # concurrency group of the methods that answer while `generate` runs


class RankActor:
    """One rank. `load` first, then `generate` any number of times, one at a time."""

    def __init__(self, plan: NodePlan, index: int) -> None:
        join_logs(plan)
        from worker.rank import Rank

        self._rank = Rank(plan, index)

    def ready(self) -> None:
        """Answer when the process is up."""

    def load(self, rendezvous: Path) -> Loaded:
        """See Rank.load."""
        return self._rank.load(rendezvous)

    def generate(self, job: Job, request: GenerationRequest, folder: Path) -> RankReport:
        """See Rank.generate."""
        return self._rank.generate(job, request, folder)

    @ray.method(concurrency_group=SIDE)
    def stop(self, why: Stop) -> None:
        """See Rank.stop."""
        self._rank.stop(why)

    @ray.method(concurrency_group=SIDE)
    def silence(self) -> float:
        """See Rank.silence."""
        return self._rank.silence()

    @ray.method(concurrency_group=SIDE)
    def finish_video(self, folder: Path) -> None:
        """See Rank.finish_video."""
        self._rank.finish_video(folder)


def rank_actor_class() -> type:
    """The class as Ray wants it: one thread for `load` and `generate`, as CUDA likes it, and three others."""
    decorate: Any = ray.remote(concurrency_groups={SIDE: 3})  # type: ignore[call-overload]
    actor: type = decorate(RankActor)
    return actor

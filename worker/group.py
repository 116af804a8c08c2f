"""The group of rank actors: started and ended as one, as a collective that misses a rank never returns."""

import contextlib
import logging
import time
import uuid
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from engine.config import GenerationRequest, ModelSpec
from jobs.job import FailureClass, Job
from worker.plan import NodePlan
from worker.processes import alive
from worker.rank_actor import rank_actor_class
from worker.reports import BadModel, Loaded, RankReport, Stop

WATCH_SECONDS = 1.0  # how often the ranks' progress is looked at
END_SECONDS = 15.0  # for killed ranks to be gone
STRAGGLER_SECONDS = 5.0  # after the first failure, how long the others have to come back by themselves
log = logging.getLogger(__name__)


class GroupBroken(Exception):
    """A rank died, hangs or failed alone: the group is of no more use."""

    def __init__(self, failure: FailureClass, detail: str) -> None:
        super().__init__(detail)
        self.failure = failure


class RankGroup:
    """N rank actors, one per bundle of the placement group. For one thread, except for `stop` and `kill`."""

    def __init__(self, plan: NodePlan, placement: PlacementGroup) -> None:
        self.plan = plan
        self._placement = placement
        self._ranks: list[Any] = []
        self.leader: Any = None  # rank 0's handle
        self._processes: list[psutil.Process] = []  # the ranks' own, once they have loaded

    def start(self) -> ModelSpec:
        """Start all ranks and load the model. Raises BadModel, or GroupBroken when a rank won't start."""
        rendezvous = self.plan.run_dir / f"ranks-{uuid.uuid4().hex[:8]}"  # never a dead group's
        actor: Any = rank_actor_class()
        resources = {"num_cpus": 1, "num_gpus": 1 if self.plan.device == "cuda" else 0}
        self._ranks = [
            actor.options(
                **resources,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._placement, index),
            ).remote(self.plan, index)
            for index in range(self.plan.ranks)
        ]
        self.leader = self._ranks[0]
        try:
            ray.get(
                [rank.ready.remote() for rank in self._ranks]
            )  # imports differ by seconds; meeting must not
            loaded: list[Loaded] = ray.get([rank.load.remote(rendezvous) for rank in self._ranks])
            self._processes = [psutil.Process(rank.pid) for rank in loaded]
        except RayTaskError as error:
            if isinstance(error.cause, BadModel):
                raise error.cause from None
            raise GroupBroken(FailureClass.INFRASTRUCTURE, f"a rank did not start: {_words(error)}") from None
        except (RayError, psutil.Error) as error:
            raise GroupBroken(FailureClass.INFRASTRUCTURE, f"a rank did not start: {_words(error)}") from None
        return loaded[0].spec

    def generate(self, job: Job, request: GenerationRequest, folder: Path) -> RankReport:
        """Run one attempt on all ranks; rank 0's report, or the failure that all ranks agree on.

        Raises GroupBroken when a rank died, failed alone, made no step for `step_timeout_seconds`, or is
        still at it so long after rank 0 was done.
        """
        pending = [rank.generate.remote(job, request, folder) for rank in self._ranks]
        reports: list[RankReport] = []
        watch = _Watch(self.leader, self.plan.settings.step_timeout_seconds)
        failed_at: float | None = None
        led_at: float | None = None  # when rank 0, which is watched, was done
        while pending:
            done, pending = ray.wait(pending, timeout=WATCH_SECONDS)
            for ref in done:
                try:
                    reports.append(_report_of(ref))
                except GroupBroken as death:
                    raise explained(death, reports) from None
            failed = [report for report in reports if report.outcome == "failed"]
            if failed and pending:
                failed_at = failed_at or time.monotonic()
                if time.monotonic() - failed_at > STRAGGLER_SECONDS:
                    raise broken_by(failed)
            if led_at is None and any(report.rank == 0 for report in reports):
                led_at = time.monotonic()
            if pending and led_at is not None and time.monotonic() - led_at > watch.limit:
                raise GroupBroken(FailureClass.INFRASTRUCTURE, _stragglers(reports, len(self._ranks)))
            watch.look()
        return agree(reports)

    @property
    def processes(self) -> tuple[psutil.Process, ...]:
        """The ranks' processes, once they have loaded. From any thread."""
        return tuple(self._processes)

    def stop(self, why: Stop) -> None:
        """Have the running attempt end at its next step boundary. From any thread."""
        if self.leader is not None:
            self.leader.stop.remote(why)

    def kill(self) -> None:
        """Kill all ranks, which ends a running `generate` with GroupBroken. From any thread.

        By signal as well: Ray asks a process to kill itself, which a hung one never does.
        """
        for rank in self._ranks:
            with contextlib.suppress(RayError):
                ray.kill(rank)
        for process in self._processes:
            with contextlib.suppress(psutil.Error):
                process.kill()

    def end(self) -> None:
        """Kill all ranks and wait until their processes, and with them their GPUs' memory, are gone."""
        self.kill()
        self._ranks, self.leader = [], None
        deadline = time.monotonic() + END_SECONDS
        while any(map(alive, self._processes)) and time.monotonic() < deadline:
            time.sleep(0.05)
        self._processes = []


class _Watch:
    """Notices a hang: rank 0 stands for all, since a collective that hangs anywhere hangs there too."""

    def __init__(self, leader: Any, limit: float) -> None:
        self._leader, self.limit = leader, limit
        self._answered_at = time.monotonic()
        self._question: Any = None

    def look(self) -> None:
        """Ask rank 0 for its silence, without waiting; raise GroupBroken when it is too long."""
        if self._question is None:
            self._question = self._leader.silence.remote()
        done, _ = ray.wait([self._question], timeout=0)
        silence = time.monotonic() - self._answered_at
        if done:
            try:
                silence = ray.get(self._question)
            except RayError as error:
                raise GroupBroken(FailureClass.INFRASTRUCTURE, f"rank 0 died: {_words(error)}") from None
            self._question, self._answered_at = None, time.monotonic()
        if silence > self.limit:
            raise GroupBroken(
                FailureClass.INFRASTRUCTURE,
                f"no step for {silence:.0f} s (limit {self.limit:.0f} s): a rank hangs",
            )


def _report_of(ref: Any) -> RankReport:
    try:
        report: RankReport = ray.get(ref)
    except ray.exceptions.OutOfMemoryError as error:
        raise GroupBroken(FailureClass.OUT_OF_MEMORY, f"a rank ran out of memory: {_words(error)}") from None
    except RayError as error:
        raise GroupBroken(FailureClass.INFRASTRUCTURE, f"a rank died: {_words(error)}") from None
    return report


def agree(reports: list[RankReport]) -> RankReport:
    """Rank 0's report if all ranks ended alike, else GroupBroken: their states may differ from now on."""
    reports = sorted(reports, key=lambda report: report.rank)
    first, failed = reports[0], [report for report in reports if report.outcome == "failed"]
    alike = all((report.outcome, report.failure) == (first.outcome, first.failure) for report in reports)
    if alike and (not failed or first.failure is FailureClass.USER):
        return first
    raise broken_by(failed or reports)


def explained(death: GroupBroken, reports: list[RankReport]) -> GroupBroken:
    """A rank's death, or what another one reported before: a rank that waits for a failed one dies of it."""
    failed = [report for report in reports if report.outcome == "failed"]
    return broken_by(failed) if failed and death.failure is not FailureClass.OUT_OF_MEMORY else death


def broken_by(reports: list[RankReport]) -> GroupBroken:
    """The failure that explains the rest: one rank's out-of-memory is why others lost their connection."""
    memory = (report for report in reports if report.failure is FailureClass.OUT_OF_MEMORY)
    cause = next(memory, reports[0])
    # A request that only some ranks refuse is our bug, not the user's.
    failure = FailureClass.INFRASTRUCTURE if cause.failure is FailureClass.USER else cause.failure
    return GroupBroken(failure, cause.detail or "the ranks ended differently")


def _stragglers(reports: list[RankReport], ranks: int) -> str:
    missing = sorted(set(range(ranks)) - {report.rank for report in reports})
    return f"rank 0 is done, but not rank {', '.join(map(str, missing))}: it hangs"


def _words(error: BaseException) -> str:
    """The first line of Ray's long stories."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"

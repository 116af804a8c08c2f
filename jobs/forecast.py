"""When a waiting job will start and a running one end, as far as that can be said honestly."""

import math
import threading
import time
from dataclasses import dataclass

from jobs.client import guard, redis_now
from jobs.job import Job, JobState
from jobs.nodes import NodeRegistry
from jobs.queries import JobReader
from jobs.scripts import PREFIX
from jobs.timings import Durations, Timings

FRESH_SECONDS = 1.0  # one look at nodes and running jobs serves all requests for so long
RUNNING_LIMIT = 64  # running jobs looked at; with more, nodes are taken to be half-way through theirs
GRAIN = 10.0  # a time that keeps moving because a job is overdue moves in steps of so many seconds


@dataclass(frozen=True)
class _View:
    """One model's service at one moment (Unix seconds by the Redis clock)."""

    taken_at: float  # time.monotonic()
    clock: float  # the Redis clock less time.monotonic()
    durations: Durations
    free_at: tuple[float | None, ...]  # when each live node takes its next job, soonest first; None: unknown


class Forecast:
    """Reads only; safe to share between threads."""

    def __init__(self, jobs: JobReader, nodes: NodeRegistry) -> None:
        self._jobs, self._nodes = jobs, nodes
        self._timings = Timings(jobs.redis)
        self._views: dict[str, _View] = {}
        self._lock = threading.Lock()

    def start_at(self, job: Job, position: int | None) -> float | None:
        """When a waiting job at `position` will start, in Unix seconds.

        None when it does not wait, when no live node serves its model, or when nothing was measured yet.
        Assumes that the jobs before it are average ones, and that no node comes or goes.
        """
        if position is None or job.state is not JobState.QUEUED:
            return None
        view = self._view(job.request.model)
        if not view.free_at:
            return None
        rounds, place = divmod(position, len(view.free_at))
        first = view.free_at[place]
        if first is None or (rounds and view.durations.mean is None):
            return None
        return float(math.ceil(first + rounds * (view.durations.mean or 0.0)))

    def eta(self, job: Job) -> float | None:
        """Seconds until a running job's GPU work is done: by its node, else from earlier videos."""
        if job.state is not JobState.RUNNING or job.eta_seconds is not None or job.started_at is None:
            return job.eta_seconds
        view = self._view(job.request.model)
        expected = view.durations.expect(job.request)
        if expected is None or job.phase == "publishing":
            return None
        left = job.started_at + expected - (time.monotonic() + view.clock)
        return round(left, 1) if left > 0 else None  # overdue: nothing honest to say

    def _view(self, model: str) -> _View:
        with self._lock:
            known = self._views.get(model)
        if known is not None and time.monotonic() - known.taken_at < FRESH_SECONDS:
            return known
        fresh = self._look(model)
        with self._lock:
            self._views[model] = fresh
        return fresh

    def _look(self, model: str) -> _View:
        with guard():
            redis = self._jobs.redis
            now = redis_now(redis)
            ids = redis.execute_command("ZRANGE", f"{PREFIX}leases:{model}", 0, RUNNING_LIMIT - 1)
        moment = time.monotonic()
        running = {job.id: job for job in self._jobs.many(ids)}
        durations = self._timings.of(model)
        longest = 2 * self._jobs.settings.lease_seconds
        free: list[float | None] = []
        for node in self._nodes.list():
            if node.model != model or node.state not in ("idle", "busy") or node.drain_requested:
                continue
            if now - node.seen_at > longest:
                continue
            free.append(_free_at(running.get(node.job_id or ""), node.job_id, durations, now))
        free.sort(key=lambda when: math.inf if when is None else when)
        return _View(moment, now - moment, durations, tuple(free))


def _free_at(job: Job | None, job_id: str | None, durations: Durations, now: float) -> float | None:
    """When a node that runs `job` (its record, if it was looked at) takes the next one."""
    if job_id is None:
        return now
    if job is None:
        return None if durations.mean is None else now + durations.mean / 2
    expected = durations.expect(job.request) or durations.mean
    if expected is not None and job.started_at is not None and job.started_at + expected > now:
        return job.started_at + expected
    if job.eta_seconds is not None:
        return now + job.eta_seconds
    return None if expected is None else math.ceil((now + 1) / GRAIN) * GRAIN

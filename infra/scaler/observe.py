"""What the scaler sees: the queue, measured job times, the nodes' registry and the cloud's list, as one
value.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from statistics import fmean, median
from typing import Protocol

from infra.scaler.driver import Health, Rented
from infra.scaler.policy import Machine, MachineState, Memory, Seen
from jobs.job import Job, JobState, Phase, VideoRequest
from jobs.nodes import NodeInfo, NodeRegistry
from jobs.store import JobStore

SAMPLE = 100  # latest finished, waiting and running jobs that are looked at for job times
QUIET_SECONDS = 15.0  # a node beats every second: a foreign one that is silent for so long is no capacity
Shape = tuple[str, int, int]  # size, frames, steps: what decides how long a job takes


class Source(Protocol):
    """Where a pool's queue and nodes are looked up, and where drains are asked for."""

    def now(self) -> float:
        """Unix seconds by the queue's clock."""
        ...

    def load(self, model: str) -> tuple[int, int, float | None]:
        """Jobs waiting, jobs running, and seconds a job (None: nothing measured)."""
        ...

    def nodes(self, model: str) -> list[NodeInfo]:
        """The model's nodes that report."""
        ...

    def drain(self, node_id: str) -> None:
        """Ask a node to take nothing new and to end; nothing happens if it does not report."""
        ...


class QueueSource:
    """The real thing, over the job store and the node registry."""

    def __init__(self, store: JobStore, registry: NodeRegistry) -> None:
        self._store = store
        self._registry = registry

    def now(self) -> float:
        """Redis TIME."""
        whole, micros = self._store.redis.execute_command("TIME")
        return int(whole) + int(micros) / 1e6

    def load(self, model: str) -> tuple[int, int, float | None]:
        """From the queue's own counters, and the records of the latest jobs."""
        rows = [row for row in self._store.queue_stats() if row.model == model]
        done = self._jobs(JobState.SUCCEEDED, model)
        ahead = [*self._jobs(JobState.QUEUED, model), *self._jobs(JobState.RUNNING, model)]
        seconds = expected_seconds(done, (job.request for job in ahead))
        return sum(row.waiting for row in rows), sum(row.running for row in rows), seconds

    def nodes(self, model: str) -> list[NodeInfo]:
        """From the registry."""
        return [node for node in self._registry.list() if node.model == model]

    def drain(self, node_id: str) -> None:
        """Through the registry, as `reel drain` does."""
        self._registry.request_drain(node_id)

    def _jobs(self, state: JobState, model: str) -> list[Job]:
        return self._store.list("*", state=state, model=model, limit=SAMPLE)[0]


def shape(request: VideoRequest) -> Shape:
    """What the time of a job depends on, for one model."""
    return request.size, request.frame_num, request.sampling_steps


def gpu_seconds(job: Job) -> float | None:
    """Seconds that a finished job held its GPUs: all phases but publishing, which runs beside others."""
    if job.result is not None and job.result.seconds:
        return sum(s for phase, s in job.result.seconds.items() if phase != Phase.PUBLISHING) or None
    if job.started_at is not None and job.finished_at is not None:
        return job.finished_at - job.started_at
    return None


def expected_seconds(done: Iterable[Job], ahead: Iterable[VideoRequest]) -> float | None:
    """Seconds a job: the median of each shape, averaged over the jobs that wait or run; None if none is
    known.

    A shape that nobody has finished yet counts with the median of all.
    """
    times: Mapping[Shape, list[float]] = defaultdict(list)
    for job in done:
        if (seconds := gpu_seconds(job)) is not None:
            times[shape(job.request)].append(seconds)
    if not times:
        return None
    overall = median(second for values in times.values() for second in values)
    medians = {key: median(values) for key, values in times.items()}
    wanted = [medians.get(shape(request), overall) for request in ahead]
    return fmean(wanted) if wanted else overall


def look(
    now: float,
    load: tuple[int, int, float | None],
    nodes: Iterable[NodeInfo],
    rented: Iterable[Rented],
    memory: Memory,
    price: float = 0.0,
) -> Seen:
    """Put the registry's nodes and the cloud's machines together by name.

    price: an hour of a machine whose cloud does not say.
    """
    by_name = {node.id: node for node in nodes}
    known = {machine.name: machine for machine in rented}
    for name, since in memory.orders:  # ordered a moment ago: the cloud's list may lag
        known.setdefault(name, Rented(name, Health.PENDING, since))
    machines = [_machine(known[name], by_name.get(name), memory, price) for name in sorted(known)]
    machines += [
        _fixed(node)
        for name, node in sorted(by_name.items())
        if name not in known and now - node.seen_at <= QUIET_SECONDS
    ]
    waiting, running, seconds = load
    return Seen(now, waiting, running, seconds, tuple(machines))


def _machine(rented: Rented, node: NodeInfo | None, memory: Memory, price: float) -> Machine:
    since = dict(memory.orders).get(rented.name, rented.since)
    state, busy = _state(rented, node, memory), node is not None and node.job_id is not None
    return Machine(rented.name, state, busy, since, rented.price or price)


def _state(rented: Rented, node: NodeInfo | None, memory: Memory) -> MachineState:
    asked = rented.name in dict(memory.drains) or (node is not None and node.drain_requested)
    if node is not None and node.state == "stopped":
        return MachineState.DRAINED
    if asked or (node is not None and node.state == "draining"):
        return MachineState.DRAINING if node is not None else MachineState.DRAINED
    if rented.health is Health.LOST:
        return MachineState.GONE
    if node is not None and node.state != "starting":
        return MachineState.SERVING
    if node is None and rented.name in memory.served:
        return MachineState.SILENT
    return MachineState.STARTING


def _fixed(node: NodeInfo) -> Machine:
    """A node that somebody else runs: capacity while it serves."""
    leaving = node.drain_requested or node.state in ("draining", "stopped")
    state = MachineState.DRAINING if leaving else MachineState.SERVING
    return Machine(node.id, state, node.job_id is not None, node.started_at, managed=False)

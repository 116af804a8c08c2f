"""The simulated world: machines that boot, nodes that claim and run, machines that vanish."""

import random
from collections import deque
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from typing import Any

import simpy

from benchmarks.simulation.clock import VirtualStore
from benchmarks.simulation.load import Arrival
from infra.scaler.driver import Rented
from infra.scaler.drivers.simulated import Offer, SimulatedCloud
from infra.scaler.observe import SAMPLE, expected_seconds
from jobs.job import Job, VideoRequest, VideoResult
from jobs.nodes import NodeInfo

MODEL = "wan"
LEASE = 15.0  # seconds, as the service's default
Process = Generator[simpy.Event, Any, None]


@dataclass
class Tally:
    """What happened. Times in seconds, in the order of finishing."""

    waits: list[float] = field(default_factory=list)  # from submit to done, less the job's own seconds
    submitted: int = 0
    repeats: int = 0  # attempts that a lost machine cost
    busy: float = 0.0  # node seconds of finished attempts
    up: float = 0.0  # node seconds from up to gone
    series: list[tuple[float, int, int, int]] = field(default_factory=list)  # time, waiting, nodes, wanted


class World:
    """One cloud market, one queue, any number of nodes; a fleet decides how many. Also the scaler's Source.
    """

    def __init__(
        self, env: simpy.Environment, store: VirtualStore, offers: list[Offer], rng: random.Random
    ) -> None:
        self.env = env
        self.store = store
        self.cloud = SimulatedCloud(offers, lambda: float(env.now), rng)
        self.tally = Tally()
        self.registry: dict[str, NodeInfo] = {}
        self._seconds: dict[str, float] = {}
        self._submitted: dict[str, float] = {}
        self._ahead: dict[str, VideoRequest] = {}
        self._done: deque[Job] = deque(maxlen=SAMPLE)
        self._processes: dict[str, simpy.Process] = {}
        self._idle: deque[simpy.Event] = deque()
        self._waiting = 0  # at the last look

    # The cloud, as a driver

    def machines(self) -> list[Rented]:
        """The cloud's list."""
        return self.cloud.machines()

    def add(self, name: str) -> None:
        """Rent, and let the node come up."""
        self.cloud.add(name)
        self._processes[name] = self.env.process(self._machine(name))
        _, lost_at = self.cloud.times(name)
        if lost_at < float("inf"):
            self.env.process(self._reclaim(name, lost_at))

    def remove(self, name: str) -> None:
        """Give back."""
        self.cloud.remove(name)
        self._end(name)

    # The scaler's source

    def now(self) -> float:
        """The virtual time."""
        return float(self.env.now)

    def load(self, model: str) -> tuple[int, int, float | None]:
        """From the real queue's counters, and the real rule for job times."""
        rows = self.store.queue_stats()
        self._waiting = sum(row.waiting for row in rows)
        ahead = list(self._ahead.values())[-SAMPLE:]
        return self._waiting, sum(r.running for r in rows), expected_seconds(self._done, ahead)

    def nodes(self, model: str) -> list[NodeInfo]:
        """The registry."""
        return list(self.registry.values())

    def drain(self, node_id: str) -> None:
        """Take nothing new; an idle node ends at once."""
        node = self.registry.get(node_id)
        if node is not None and not node.drain_requested:
            node.drain_requested = True
            if node.job_id is None:
                self._end(node_id, drained=True)

    # What goes on

    def submit_all(self, arrivals: Iterable[Arrival]) -> Process:
        """Submit each job at its time."""
        for arrival in arrivals:
            yield self.env.timeout(arrival.at - self.env.now)
            job, _ = self.store.submit(arrival.job)
            self.tally.submitted += 1
            self._seconds[job.id], self._submitted[job.id] = arrival.seconds, arrival.at
            self._ahead[job.id] = arrival.job.request
            self._wake()

    def outage(self, cloud: str, start: float, end: float) -> Process:
        """A whole cloud goes, and comes back."""
        yield self.env.timeout(start)
        for name in self.cloud.fail(cloud):
            self._end(name)
        yield self.env.timeout(end - start)
        self.cloud.heal(cloud)

    def every(self, seconds: float, act: Callable[[], int]) -> Process:
        """Call a fleet's pass for ever, and keep the series for the picture; it returns how many it wants."""
        while True:
            wanted = act()
            self.tally.series.append((self.env.now, self._waiting, len(self.registry), wanted))
            yield self.env.timeout(seconds)

    def _machine(self, name: str) -> Process:
        up_at, _ = self.cloud.times(name)
        held: Job | None = None
        try:
            yield self.env.timeout(up_at - self.env.now)
            node = self.registry[name] = NodeInfo(id=name, model=MODEL, state="idle", started_at=up_at)
            while not node.drain_requested:
                held = self.store.claim(MODEL, name)
                if held is None:
                    node.state, node.job_id = "idle", None
                    woken = self.env.event()
                    self._idle.append(woken)
                    yield woken
                    continue
                node.state, node.job_id = "busy", held.id
                yield self.env.timeout(self._seconds[held.id])
                self._finish(held)
                held = None
        except simpy.Interrupt as reason:
            if held is not None and reason.cause != "drained":
                self.tally.repeats += 1
                self.store.let_lease_end(held.id, held.token, LEASE)
                self.env.process(self._wake_later(LEASE + 0.001))
        finally:
            self._processes.pop(name, None)
            if self.registry.pop(name, None) is not None:
                self.tally.up += self.env.now - up_at
            self._wake()  # in case this one had been woken for a job and never claimed it

    def _finish(self, job: Job) -> None:
        seconds = self._seconds[job.id]
        result = VideoResult(
            video_key="v", poster_key="p", manifest_key="m", width=1, height=1, frames=1, fps=16,
            bytes=1, sha256="0", seconds={"denoising": seconds},
        )  # fmt: skip
        self._done.appendleft(self.store.finish(job.id, job.token, result))
        self._ahead.pop(job.id, None)
        self.tally.busy += seconds
        self.tally.waits.append(self.env.now - self._submitted.pop(job.id) - seconds)

    def _end(self, name: str, *, drained: bool = False) -> None:
        process = self._processes.get(name)
        if process is not None and process.is_alive:
            process.interrupt("drained" if drained else "lost")

    def _reclaim(self, name: str, at: float) -> Process:
        yield self.env.timeout(at - self.env.now)
        self._end(name)

    def _wake_later(self, seconds: float) -> Process:
        yield self.env.timeout(seconds)
        self._wake()

    def _wake(self) -> None:
        while self._idle:
            event = self._idle.popleft()
            if event.callbacks:  # its node still waits
                event.succeed()
                return

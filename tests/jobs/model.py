"""What the store should do, in plain Python: no Redis, no Lua, no time but a counter."""

from collections import defaultdict
from dataclasses import dataclass, field
from itertools import count

LEVEL = {"high": 0, "normal": 1, "low": 2}
LIVE = ("queued", "running")


@dataclass
class ModelJob:
    """One job. `order`: its place in its lane; `lease_over`, `deadline_over`: time that passed."""

    id: str
    key: str
    priority: str
    order: int
    hooked: bool
    state: str = "queued"
    attempts: int = 0
    memory_failures: int = 0
    token: int = 0  # how many claims; the real one is a time
    owner: str | None = None
    cancel_requested: bool = False
    started: bool = False
    dead: bool = False
    lease_over: bool = False
    deadline_over: bool = False
    turn: tuple[int, str] | None = None  # the (level, key) that was charged for its last start
    ended: tuple[int, str] | None = None  # the (token, call) that ended its last attempt
    deliveries: list[str] = field(default_factory=list)


class Model:
    """All jobs of one model's queue."""

    def __init__(self, max_attempts: int) -> None:
        self.max_attempts = max_attempts
        self.jobs: dict[str, ModelJob] = {}
        self._orders = count()
        self._clock: dict[int, int] = defaultdict(int)
        self._turns: dict[tuple[int, str], int] = defaultdict(int)

    def submit(self, job_id: str, key: str, priority: str, hooked: bool) -> None:
        """A new job at the back of its lane."""
        self.jobs[job_id] = ModelJob(job_id, key, priority, next(self._orders), hooked)

    def claim(self, node: str) -> str | None:
        """The id that a claim must return."""
        for job in sorted((j for j in self.jobs.values() if j.lease_over), key=lambda j: j.id):
            self.lose(job)
            if job.state == "queued":
                self._left_lane()
                self._start(job, node)
                return job.id
        while lanes := self._lanes():
            level, turn, _, job = min(lanes, key=lambda lane: lane[:3])
            if job.deadline_over and not job.started:
                self.conclude(job, "expired")
                continue
            job.state = "running"
            self._clock[level] = turn
            self._turns[level, job.key] = turn + 1
            self._left_lane()
            job.turn = (level, job.key)
            self._start(job, node)
            return job.id
        return None

    def lose(self, job: ModelJob) -> None:
        """The lease is over and somebody noticed."""
        job.lease_over = False
        self._charge(job, "lost")

    def fail(self, job: ModelJob, kind: str) -> None:
        """The owner reports a failure."""
        job.ended = (job.token, "fail")
        self._charge(job, kind)

    def give_back(self, job: ModelJob) -> None:
        """The owner drains."""
        job.ended = (job.token, "give_back")
        if job.cancel_requested:
            self.conclude(job, "canceled")
            return
        if job.turn and self._turns[job.turn] > 0:
            self._turns[job.turn] -= 1
        self._requeue(job)

    def finish(self, job: ModelJob) -> None:
        """The owner commits."""
        job.ended = (job.token, "finish")
        self.conclude(job, "succeeded")

    def cancel_running(self, job: ModelJob) -> None:
        """The owner stopped."""
        job.ended = (job.token, "cancel_running")
        self.conclude(job, "canceled")

    def cancel(self, job: ModelJob) -> None:
        """The client cancels a live job."""
        if job.state == "queued":
            self.conclude(job, "canceled")
        else:
            job.cancel_requested = True

    def reject(self, job: ModelJob) -> None:
        """An operator fails a waiting job."""
        self.conclude(job, "failed")
        job.dead = True

    def replay(self, job: ModelJob) -> None:
        """An operator queues a dead-letter job again."""
        job.state, job.attempts, job.memory_failures, job.dead = "queued", 0, 0, False
        job.owner, job.cancel_requested, job.ended, job.deadline_over = None, False, None, False
        job.order = next(self._orders)

    def sweep(self) -> None:
        """Everything that is over is noticed."""
        for job in self.jobs.values():
            if job.lease_over:
                self.lose(job)
            if job.state == "queued" and job.deadline_over and not job.started:
                self.conclude(job, "expired")

    def conclude(self, job: ModelJob, state: str) -> None:
        """A terminal state."""
        waited = job.state == "queued"
        job.state, job.lease_over = state, False
        self._tell(job, state)
        if waited:
            self._left_lane()

    def _lanes(self) -> list[tuple[int, int, str, ModelJob]]:
        heads: dict[tuple[int, str], ModelJob] = {}
        for job in sorted((j for j in self.jobs.values() if j.state == "queued"), key=lambda j: j.order):
            heads.setdefault((LEVEL[job.priority], job.key), job)
        return [
            (level, max(self._clock[level], self._turns[level, key]), f"{level}:{key}", head)
            for (level, key), head in heads.items()
        ]

    def _left_lane(self) -> None:
        """When nobody waits any more, everybody starts even again."""
        if not any(job.state == "queued" for job in self.jobs.values()):
            self._clock.clear()
            self._turns.clear()

    def _start(self, job: ModelJob, node: str) -> None:
        job.state, job.owner, job.started, job.lease_over = "running", node, True, False
        job.token += 1
        job.ended = None
        self._tell(job, "started")

    def _charge(self, job: ModelJob, kind: str) -> None:
        job.attempts += 1
        job.lease_over = False
        again = job.attempts < self.max_attempts and kind != "user"
        if kind == "out_of_memory":
            job.memory_failures += 1
            again = again and job.memory_failures == 1
        if job.cancel_requested:
            self.conclude(job, "canceled")
        elif again:
            self._requeue(job)
        else:
            self.conclude(job, "failed")
            job.dead = kind != "user"

    def _requeue(self, job: ModelJob) -> None:
        job.state, job.owner, job.lease_over = "queued", None, False

    def _tell(self, job: ModelJob, event: str) -> None:
        if job.hooked:
            job.deliveries.append(f"job.{event}")

"""A small history without any process but Redis: what the checker is tried on, with and without bugs."""

import contextlib
import hashlib
import random
import time
from typing import Any

from redis.exceptions import ResponseError

from jobs.errors import IllegalTransition, LeaseLost
from jobs.job import FailureClass, Job, JobError, NewJob, WebhookEvent
from jobs.outbox import Outbox
from jobs.store import JobStore
from tests.chaos.checks.case import Rules
from tests.chaos.redis_wire import Call
from tests.chaos.snapshot import snapshot
from tests.support.jobs import new_job, result
from tests.support.redis import rewind

RULES = Rules(lease=0.0, sweep=0.0, max_attempts=3, s3=False)  # leases end by rewinding them
EVENTS = tuple(event for event in WebhookEvent if event is not WebhookEvent.PROGRESS)


class Miniature:
    """Jobs, two nodes and a receiver, all in this process; records as the wires would."""

    def __init__(self, store: JobStore, seed: int) -> None:
        self.store, self.rng = store, random.Random(seed)
        self.history: list[dict[str, Any]] = []
        self.outbox = Outbox(store.redis, store.settings)
        self._run = store.scripts.run
        store.scripts.run = self._recorded  # type: ignore[method-assign]
        self._who = "node-1"

    def tour(self, jobs: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """(history, final store) after so many jobs with all sorts of lives."""
        lives = (self.quiet, self.paused, self.failing, self.returned, self.canceled)
        for number in range(jobs):
            new = new_job(callback_url="https://example.com/hook", webhook_events=EVENTS)
            self.submit(number, new)
            lives[number % len(lives)](new.id)
            if self.rng.random() < 0.3:
                self.send_webhooks()
        for _ in range(20):
            self.send_webhooks()
        return self.history, snapshot(self.store.redis, None, None)

    def submit(self, number: int, new: NewJob) -> None:
        """As a client."""
        t0 = time.time()
        self.store.submit(new)
        self._add("submit", t0=t0, idem=f"i{number}", seed=number, st=202, id=new.id)

    # Lives of a job; each leaves it ended, if the store is right

    def quiet(self, job_id: str) -> None:
        """Nothing happens."""
        self._finish("node-1", self._claim("node-1"))

    def paused(self, job_id: str) -> None:
        """Its node is paused past the lease, comes back, and writes what it likes."""
        first = self._claim("node-1")
        rewind(self.store.redis, job_id, lease=True)
        second = self._claim("node-2")
        self._heartbeat("node-1", first)
        self._finish("node-1", first)
        self._finish("node-2", second)

    def failing(self, job_id: str) -> None:
        """Every attempt fails."""
        for _ in range(3):
            if (job := self._claim("node-1")) is not None:
                error = JobError(
                    type="boom", title="Boom", detail="", failure_class=FailureClass.INFRASTRUCTURE
                )
                self._try("node-1", lambda job=job, error=error: self.store.fail(job.id, job.token, error))

    def returned(self, job_id: str) -> None:
        """Its node drains."""
        job = self._claim("node-1")
        if job is not None:
            self._try("node-1", lambda: self.store.give_back(job.id, job.token))
        self._finish("node-2", self._claim("node-2"))

    def canceled(self, job_id: str) -> None:
        """While it runs."""
        job = self._claim("node-1")
        self._add("cancel", t0=time.time(), id=job_id, st=202, state=self.store.cancel(job_id).state.value)
        if job is not None:
            self._try("node-1", lambda: self.store.cancel_running(job.id, job.token))

    def send_webhooks(self) -> None:
        """All that is due, in any order."""
        due = self.outbox.due()
        self.rng.shuffle(due)
        for one in due:
            delivery = self.outbox.take(one, 60)
            if delivery is None:
                continue
            sha = hashlib.sha256(repr(delivery.data).encode()).hexdigest()
            self._add(
                "hook", id=delivery.id, job=delivery.job_id, type=delivery.event, path="/hook", st=204,
                sha=sha, ok=True,
            )  # fmt: skip
            self.outbox.delivered(delivery.id, 204, attempt=delivery.attempt)

    def _claim(self, who: str) -> Job | None:
        self._who = who
        return self.store.claim("tiny", who)

    def _heartbeat(self, who: str, job: Job | None) -> None:
        if job is not None:
            self._try(
                who, lambda: self.store.heartbeat(job.id, job.token, phase="denoising", step=1, progress=0.5)
            )

    def _finish(self, who: str, job: Job | None) -> None:
        if job is not None:
            self._try(who, lambda: self.store.finish(job.id, job.token, result(job.id, job.token)))

    def _try(self, who: str, call: Any) -> None:
        self._who = who
        with contextlib.suppress(LeaseLost, IllegalTransition, ResponseError):
            call()

    def _recorded(self, name: str, *args: Any, durable: bool = False) -> Any:
        call = Call(self._who, name, [str(arg) for arg in args])
        reply = self._run(name, *args, durable=durable)
        call.reply = [one.encode() if isinstance(one, str) else one for one in reply] if reply else reply
        if call.result != "none":
            self._add("call", t0=call.t0, who=call.who, s=name, job=call.job, token=call.token, r=call.result)
        time.sleep(0.0002)  # so that the order of times is the order of things
        return reply

    def _add(self, kind: str, **fields: Any) -> None:
        self.history.append({"k": kind, "t": time.time(), **fields})

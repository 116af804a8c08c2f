"""The job store: every way a job changes, each one Lua script (keys: scripts.py, guards: lua/)."""

import json
import threading
from collections.abc import Sequence
from typing import Any
from uuid import uuid4

from jobs.client import RedisClient, guard
from jobs.errors import IdempotencyConflict, IllegalTransition, JobNotFound, LeaseLost, QueueFull
from jobs.job import SCHEMA, Job, JobError, JobState, NewJob, Phase, VideoResult
from jobs.queries import JobReader
from jobs.records import from_reply, to_body, to_record
from jobs.scripts import PREFIX
from jobs.settings import Settings
from jobs.sweep import Sweeper, SweepReport

Ids = list[str]
DETAIL_LIMIT = 2000  # characters of an error's detail that are kept; webhooks must stay under 20 kB


class JobStore(JobReader):
    """Submits, claims and ends jobs. Safe to share between threads; every method is one round trip.

    Every method raises StoreUnavailable when Redis can't be reached: nothing was half-written, and the same
    call may be made again.
    """

    def __init__(self, redis: RedisClient, settings: Settings) -> None:
        super().__init__(redis, settings)
        self._nonces: dict[tuple[str, str], str] = {}  # claims whose reply never came
        self._lock = threading.Lock()

    # The client's side

    def submit(self, new: NewJob) -> tuple[Job, bool]:
        """Store a job and queue it: (job, created). created is False for an idempotent replay.

        Raises IdempotencyConflict (same key, other body) and QueueFull.
        """
        limit = self.settings.max_outstanding_per_key if new.max_outstanding is None else new.max_outstanding
        reply = self.scripts.run(
            "submit",
            json.dumps(to_record(new)),
            to_body(new),
            new.idempotency_key or "",
            new.body_hash,
            limit,
            self.settings.max_queued,
            "" if new.deadline_seconds is None else new.deadline_seconds,
            durable=True,
        )
        if reply[0] == "conflict":
            raise IdempotencyConflict(new.idempotency_key or "", str(reply[1]))
        if reply[0] == "full":
            raise QueueFull(int(reply[1]), str(reply[2]))
        return from_reply(reply), reply[0] == "ok"

    def cancel(self, job_id: str) -> Job:
        """Cancel a queued job at once, or ask a running one's owner to stop (`cancel_requested`).

        Raises JobNotFound, and IllegalTransition when the job has ended.
        """
        return self._operate("cancel", job_id, JobState.CANCELED)

    def delete(self, job_id: str) -> Job:
        """Remove an ended job's record; its files stay named in `garbage` until somebody removes them.

        Raises JobNotFound, and IllegalTransition when the job is live.
        """
        return self._operate("delete", job_id, "deleted")

    # The node's side: each compares the token and raises LeaseLost

    def claim(self, model: str, node_id: str, *, schema: int = SCHEMA) -> Job | None:
        """Take the next job of `model`, a dead node's first; None when nothing may be claimed now."""
        with self._lock:
            nonce = self._nonces.setdefault((model, node_id), uuid4().hex)
        reply: Any = ["more"]
        while reply[0] == "more":
            reply = self.scripts.run("claim", model, node_id, schema, nonce)
        with self._lock:
            self._nonces.pop((model, node_id), None)
        return None if reply[0] == "none" else from_reply(reply)

    def heartbeat(
        self,
        job_id: str,
        token: int,
        *,
        phase: Phase | str,
        step: int,
        progress: float,
        eta_seconds: float | None = None,
    ) -> bool:
        """Renew the lease and report: progress in 0..1, eta in seconds. Returns whether to stop (cancel)."""
        progress = min(1.0, max(0.0, progress))
        eta = "" if eta_seconds is None else f"{eta_seconds:.3f}"
        reply = self.scripts.run("heartbeat", job_id, token, Phase(phase).value, step, f"{progress:.6g}", eta)
        return bool(self._owned(job_id, token, reply)[1] == "1")

    def finish(self, job_id: str, token: int, result: VideoResult) -> Job:
        """Commit the result: the job has succeeded, also if a cancel came meanwhile (too late)."""
        reply = self.scripts.run("finish", job_id, token, result.model_dump_json(), durable=True)
        return from_reply(self._owned(job_id, token, reply))

    def fail(self, job_id: str, token: int, error: JobError) -> Job:
        """Report a failed attempt: queued again, or failed (dead letter), by class and attempts so far."""
        kept = error.model_copy(update={"detail": error.detail[:DETAIL_LIMIT]})
        reply = self.scripts.run(
            "fail", job_id, token, kept.failure_class.value, kept.model_dump_json(), durable=True
        )
        return from_reply(self._owned(job_id, token, reply))

    def give_back(self, job_id: str, token: int) -> Job:
        """Return the job unfinished, to the front of its lane, without using up an attempt (draining)."""
        return from_reply(self._owned(job_id, token, self.scripts.run("give_back", job_id, token)))

    def cancel_running(self, job_id: str, token: int) -> Job:
        """Confirm that the work stopped because of a cancel. IllegalTransition when none was asked for."""
        reply = self.scripts.run("cancel_running", job_id, token, durable=True)
        if reply[0] == "illegal":
            raise IllegalTransition(job_id, str(reply[1]), "canceled without a request to cancel")
        return from_reply(self._owned(job_id, token, reply))

    # Operators and the sweeper

    def replay(self, job_id: str) -> Job:
        """Queue a dead-letter job again, with fresh attempts. Raises JobNotFound, IllegalTransition."""
        return self._operate("replay", job_id, JobState.QUEUED)

    def reject(self, job_id: str, error: JobError) -> Job:
        """Fail a waiting job that no node will take, such as one of a withdrawn model."""
        return self._operate("reject", job_id, JobState.FAILED, error.model_dump_json())

    def sweep(self, limit: int = 100) -> SweepReport:
        """One pass over expired leases, deadlines and retention, `limit` of each; sweeps may overlap."""
        return Sweeper(self.scripts).run(limit)

    def garbage(self, limit: int = 100) -> Ids:
        """Ids of removed jobs whose files under ``jobs/<id>/`` may still exist; then call `garbage_done`."""
        with guard():
            return list(self.redis.execute_command("ZRANGE", f"{PREFIX}garbage", 0, limit - 1))

    def garbage_done(self, job_id: str) -> None:
        """Forget a removed job: its files are gone too."""
        with guard():
            self.redis.execute_command("ZREM", f"{PREFIX}garbage", job_id)

    def wait_wake(self, model: str, timeout: float) -> bool:
        """Sleep until a job of `model` is queued, at most `timeout` seconds. True: try a claim now.

        A hint only: another node may be faster, and a wake-up may be missed, so poll as well.
        """
        longest = max(
            0.01, min(timeout, self.settings.redis_timeout * 0.8)
        )  # stay under the socket's timeout
        with guard():
            return self.redis.execute_command("BRPOP", f"{PREFIX}wake:{model}", longest) is not None

    def _operate(self, script: str, job_id: str, wanted: str, *args: str) -> Job:
        reply = self.scripts.run(script, job_id, *args, uuid4().hex, durable=True)
        if reply[0] == "missing":
            raise JobNotFound(job_id)
        if reply[0] == "illegal":
            raise IllegalTransition(job_id, str(reply[1]), wanted)
        return from_reply(reply)

    @staticmethod
    def _owned(job_id: str, token: int, reply: Sequence[Any]) -> Sequence[Any]:
        if reply[0] == "lost":
            raise LeaseLost(job_id, token, str(reply[1]))
        return reply

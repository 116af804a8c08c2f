"""Reading jobs: one, pages of them, their place in the queue, and the queue's figures."""

import hashlib
from dataclasses import dataclass
from typing import Any

from jobs.client import RedisClient, guard
from jobs.errors import IdempotencyConflict, JobNotFound
from jobs.job import Job, JobState, Priority
from jobs.records import from_record
from jobs.scripts import PREFIX, Scripts
from jobs.settings import Settings

SCAN = 500  # ids looked at for one page when a filter has no index of its own
Page = tuple[list[Job], str | None]  # jobs, and the next page's cursor
Ids = list[str]
Jobs = list[Job]
MaybeJobs = list[Job | None]
LEVELS = (Priority.HIGH, Priority.NORMAL, Priority.LOW)


@dataclass(frozen=True)
class QueueStats:
    """One model's queue at one priority."""

    model: str
    priority: Priority
    waiting: int
    running: int
    oldest_seconds: float | None  # how long the longest-waiting job has waited; None: nobody waits


AllStats = list[QueueStats]


class JobReader:
    """The read side of the store."""

    def __init__(self, redis: RedisClient, settings: Settings) -> None:
        self.redis = redis
        self.settings = settings
        self.scripts = Scripts(redis, settings)

    def get(self, job_id: str) -> Job:
        """The job, whoever's it is. Raises JobNotFound."""
        job = self._fetch([job_id])[0]
        if job is None:
            raise JobNotFound(job_id)
        return job

    def list(
        self,
        key_id: str,
        *,
        state: JobState | None = None,
        model: str | None = None,
        ref: str | None = None,
        cursor: str | None = None,
        limit: int = 20,
    ) -> Page:
        """One page, newest first, and the cursor of the next (None: this was the last).

        key_id: whose jobs; ``*`` means everybody's. Jobs that arrive meanwhile never shift the pages.
        A page may be shorter than `limit`, or empty, though more follow, when several filters are combined
        (or model or ref with ``*``): at most SCAN ids are looked at per call.
        """
        index, checks = self._index(key_id, state, model, ref)
        found: list[Job] = []
        last = cursor
        looked = 0
        while len(found) < limit and looked < SCAN:
            step = min(SCAN - looked, limit - len(found) if not checks else 100)
            with guard():
                top = f"({last}" if last else "+"
                ids = self.redis.execute_command("ZREVRANGEBYLEX", index, top, "-", "LIMIT", 0, step)
            looked += step
            for job_id, job in zip(ids, self._fetch(ids), strict=True):
                last = job_id
                if job and (job.key_id == key_id or key_id == "*") and self._matches(job, state, model, ref):
                    found.append(job)
                    if len(found) == limit:
                        break
            else:
                if len(ids) < step:
                    return found, None
        return found, last if self._more(index, last) else None

    def many(self, job_ids: Ids) -> Jobs:
        """Those of these jobs that still exist."""
        return [job for job in self._fetch(job_ids) if job is not None]

    def submitted(self, key_id: str, idempotency_key: str, body_hash: str) -> Job | None:
        """The job that an earlier request with this Idempotency-Key made, if it still exists.

        Raises IdempotencyConflict when that request had another body.
        """
        with guard():
            digest, job_id = self.redis.execute_command(
                "HMGET", f"{PREFIX}idem:{key_id}:{idempotency_key}", "hash", "job"
            )
        job = self._fetch([job_id])[0] if job_id else None
        if job is not None and digest != body_hash:
            raise IdempotencyConflict(idempotency_key, job.id)
        return job

    def position(self, job_id: str) -> int | None:
        """How many waiting jobs are likely to start first (0: next); None when it does not wait.

        Exact within one API key's lane; across lanes of one level it assumes that keys share evenly.
        Raises JobNotFound.
        """
        place = int(self.scripts.run("position", job_id))
        if place == -2:
            raise JobNotFound(job_id)
        return None if place < 0 else place

    def queue_stats(self) -> AllStats:
        """Every model's queue by priority."""
        return [
            QueueStats(model, LEVELS[int(level)], int(waiting), int(running), float(age) if age else None)
            for model, level, waiting, running, age in self.scripts.run("stats")
        ]

    def dead(self, *, cursor: str | None = None, limit: int = 20) -> Page:
        """One page of the dead letter, latest failure first, and the next cursor."""
        start = int(cursor or 0)
        with guard():
            ids = self.redis.execute_command("ZREVRANGE", f"{PREFIX}dead", start, start + limit)
        jobs = [job for job in self._fetch(ids[:limit]) if job]
        return jobs, str(start + limit) if len(ids) > limit else None

    def _fetch(self, ids: Ids) -> MaybeJobs:
        if not ids:
            return []
        with guard():
            pipe = self.redis.pipeline(transaction=True)
            for job_id in ids:
                pipe.execute_command("HGETALL", f"{PREFIX}job:{job_id}")
                pipe.execute_command("GET", f"{PREFIX}body:{job_id}")
            replies: list[Any] = pipe.execute()
        return [
            from_record(flat, body) if flat and body else None
            for flat, body in zip(replies[::2], replies[1::2], strict=True)
        ]

    @staticmethod
    def _index(key_id: str, state: JobState | None, model: str | None, ref: str | None) -> tuple[str, bool]:
        """The narrowest index for these filters, and whether records must be checked against the rest."""
        given = sum(value is not None for value in (state, model, ref))
        own = f"{PREFIX}list:{key_id}:"
        if key_id == "*":
            return (f"{own}s:{state}", given > 1) if state else (f"{own}all", given > 0)
        if ref is not None:
            return f"{own}r:{hashlib.sha1(ref.encode(), usedforsecurity=False).hexdigest()}", given > 1
        if state is not None:
            return f"{own}s:{state}", given > 1
        return (f"{own}m:{model}", False) if model is not None else (f"{own}all", False)

    @staticmethod
    def _matches(job: Job, state: JobState | None, model: str | None, ref: str | None) -> bool:
        return (
            (state is None or job.state == state)
            and (model is None or job.request.model == model)
            and (ref is None or job.metadata.get("ref") == ref)
        )

    def _more(self, index: str, last: str | None) -> bool:
        with guard():
            top = f"({last}" if last else "+"
            return bool(self.redis.execute_command("ZREVRANGEBYLEX", index, top, "-", "LIMIT", 0, 1))

"""The sweep: what must happen though no node and no client asks for it."""

import json
from dataclasses import dataclass, field

from jobs.client import RedisClient, guard, redis_now
from jobs.scripts import PREFIX, Scripts

TRIMMED = 1000  # entries that leave the webhooks' dead letter in one sweep, at most


@dataclass
class SweepReport:
    """What one sweep did: job ids by outcome."""

    requeued: list[str] = field(default_factory=list)  # lease lost, tries left
    failed: list[str] = field(default_factory=list)  # lease lost, no tries left: in the dead letter
    canceled: list[str] = field(default_factory=list)  # lease lost after a cancel was asked for
    expired: list[str] = field(default_factory=list)  # deadline passed before the first start
    purged: list[str] = field(default_factory=list)  # retention over; see JobStore.garbage for their files

    @property
    def total(self) -> int:
        """How many jobs changed."""
        return sum(map(len, (self.requeued, self.failed, self.canceled, self.expired, self.purged)))


class Sweeper:
    """Finds what is due and runs one script for each, which looks again: sweeps may overlap anything."""

    def __init__(self, scripts: Scripts) -> None:
        self._scripts = scripts
        self._redis = scripts.redis

    def run(self, limit: int) -> SweepReport:
        """At most `limit` jobs of each kind, oldest first."""
        report = SweepReport()
        with guard():
            models = sorted(self._redis.execute_command("SMEMBERS", f"{PREFIX}queues"))
        for model in models:
            self._scripts.run("rise", model)
            for job_id in self._due(f"leases:{model}", limit):
                self._lose(job_id, model, report)
        for job_id in self._due("deadlines", limit):
            if self._scripts.run("expire", job_id)[0] == "ok":
                report.expired.append(job_id)
        for job_id in self._due("retention", limit):
            if self._scripts.run("purge", job_id)[0] == "ok":
                report.purged.append(job_id)
        self._scripts.run("outbox_trim", TRIMMED)
        return report

    def _lose(self, job_id: str, model: str, report: SweepReport) -> None:
        reply = self._scripts.run("lose", job_id, model)
        if reply[0] != "ok":
            return
        state = json.loads(reply[1])["state"]
        {"queued": report.requeued, "failed": report.failed}.get(state, report.canceled).append(job_id)

    def _due(self, index: str, limit: int) -> list[str]:
        with guard():
            whole, micros = self._redis.execute_command("TIME")
            now = f"{int(whole)}.{int(micros):06d}"
            return list(
                self._redis.execute_command(
                    "ZRANGEBYSCORE", f"{PREFIX}{index}", "-inf", now, "LIMIT", 0, limit
                )
            )


def garbage_later(redis: RedisClient, job_id: str) -> None:
    """A removed job whose files can't be removed now: the others of `JobStore.garbage` go first."""
    with guard():
        now = int(redis_now(redis))
        redis.execute_command("ZADD", f"{PREFIX}garbage", "XX", now, job_id)

"""The webhook outbox: the transition scripts create deliveries; this side leases, reports and lists them."""

import hashlib
import json
from typing import Any, Literal

from pydantic import BaseModel

from jobs.client import RedisClient, guard
from jobs.endpoints import Endpoint
from jobs.ids import new_id
from jobs.records import pairs
from jobs.scripts import PREFIX, Scripts
from jobs.settings import Settings

ERROR_LIMIT = 500  # characters of a delivery's error that are kept


class Delivery(BaseModel):
    """One webhook. `id` is the ``webhook-id`` header: the same over all its attempts."""

    id: str
    job_id: str | None = None  # None: a test event
    key_id: str  # whose webhook secret signs it, unless it goes to an endpoint
    endpoint: str | None = None  # that it goes to, signed with its secret; None: the job's callback
    event: str  # such as job.succeeded
    url: str
    data: dict[str, Any]  # the job when the event happened; never changes
    created_at: float  # Unix seconds by the Redis clock: the payload's `timestamp`
    state: Literal["pending", "delivered", "dead"]
    attempts: int = 0  # tries since it was created or redelivered; the retry schedule's index
    attempt: int = 0  # rises with every take; report with it
    lease_until: float | None = None
    next_at: float | None = None  # when it is due; None: not its turn yet, or ended
    status: int | None = None  # the last HTTP status; None: none came
    error: str = ""
    ended_at: float | None = None


class Outbox:
    """Leased access to the deliveries. A job's deliveries to one receiver become due in order, one by one."""

    def __init__(self, redis: RedisClient, settings: Settings) -> None:
        self.redis = redis
        self._scripts = Scripts(redis, settings)

    def due(self, limit: int = 100) -> list[str]:
        """Ids of deliveries to send now, longest due first. Cheap; call it often."""
        with guard():
            whole, micros = self.redis.execute_command("TIME")
            return list(
                self.redis.execute_command(
                    "ZRANGEBYSCORE",
                    f"{PREFIX}outbox",
                    "-inf",
                    f"{int(whole)}.{int(micros):06d}",
                    "LIMIT",
                    0,
                    limit,
                )
            )

    def take(self, delivery_id: str, seconds: float) -> Delivery | None:
        """Lease one due delivery for `seconds`; None when another worker has it or it has ended."""
        reply = self._scripts.run("outbox_take", delivery_id, seconds)
        return _parse(pairs(reply[1])) if reply[0] == "ok" else None

    def delivered(self, delivery_id: str, status: int, *, attempt: int) -> bool:
        """The receiver answered 2xx. False: it had ended already."""
        return self._settle(delivery_id, attempt, "delivered", status, "", 0)

    def retry(
        self, delivery_id: str, delay: float, *, attempt: int, status: int | None = None, error: str = ""
    ) -> bool:
        """Due again in `delay` seconds. False: this attempt's lease was lost, or the delivery has ended."""
        return self._settle(delivery_id, attempt, "retry", status, error, delay)

    def dead(
        self,
        delivery_id: str,
        *,
        attempt: int,
        status: int | None = None,
        error: str = "",
        gone: bool = False,
    ) -> bool:
        """Give up: into the dead letter; the job's next delivery gets its turn.

        gone: the receiver answered 410: the job's other deliveries to it end too, and new ones to the same
        address go straight to the dead letter for a day.
        """
        return self._settle(delivery_id, attempt, "gone" if gone else "dead", status, error, 0)

    def get(self, delivery_id: str) -> Delivery | None:
        """One delivery, or None."""
        with guard():
            fields = pairs(self.redis.execute_command("HGETALL", f"{PREFIX}delivery:{delivery_id}"))
        return _parse(fields) if fields else None

    def for_job(self, job_id: str) -> list[Delivery]:
        """All deliveries of a job, in order."""
        with guard():
            return self._many(self.redis.execute_command("LRANGE", f"{PREFIX}deliveries:{job_id}", 0, -1))

    def for_endpoint(self, endpoint_id: str, limit: int = 50) -> list[Delivery]:
        """The last deliveries to an endpoint, latest first."""
        with guard():
            ids = self.redis.execute_command("LRANGE", f"{PREFIX}deliveries:{endpoint_id}", -limit, -1)
            return self._many(ids[::-1])

    def ping(self, endpoint: Endpoint) -> Delivery:
        """Queue a `webhook.test` event to an endpoint."""
        # The id names the chain, as a job's deliveries do: their records may expire before they are sent.
        delivery_id = new_id(f"msg_{endpoint.id.removeprefix('we_')}")
        data = json.dumps({"id": endpoint.id, "message": "This is a test. Nothing has happened to any job."})
        flat = self._scripts.run(
            "outbox_ping", delivery_id, endpoint.key_id, endpoint.id, endpoint.url, data, durable=True
        )
        return _parse(pairs(flat))

    def gone(self, url: str) -> bool:
        """Whether the address answered 410 within the last day: nothing is posted there meanwhile."""
        digest = hashlib.sha1(url.encode(), usedforsecurity=False).hexdigest()
        with guard():
            return bool(self.redis.execute_command("EXISTS", f"{PREFIX}gone:{digest}"))

    def dead_letter(self, limit: int = 100) -> list[Delivery]:
        """Deliveries given up, latest first."""
        with guard():
            return self._many(self.redis.execute_command("ZREVRANGE", f"{PREFIX}outbox:dead", 0, limit - 1))

    def redeliver(self, delivery_id: str) -> bool:
        """Send an ended delivery again with the same id, or a waiting one now. False: no such delivery."""
        return bool(self._scripts.run("outbox_redeliver", delivery_id))

    def pending(self) -> int:
        """How many receivers of a job have a delivery waiting or under way."""
        with guard():
            return int(self.redis.execute_command("ZCARD", f"{PREFIX}outbox"))

    def _many(self, ids: list[str]) -> list[Delivery]:
        pipe = self.redis.pipeline(transaction=False)
        for delivery_id in ids:
            pipe.execute_command("HGETALL", f"{PREFIX}delivery:{delivery_id}")
        return [_parse(pairs(fields)) for fields in (pipe.execute() if ids else []) if fields]

    def _settle(
        self, delivery_id: str, attempt: int, outcome: str, status: int | None, error: str, delay: float
    ) -> bool:
        code = "" if status is None else status
        reply = self._scripts.run(
            "outbox_settle", delivery_id, attempt, outcome, code, error[:ERROR_LIMIT], delay, durable=True
        )
        return bool(reply)


def _parse(fields: dict[str, str]) -> Delivery:
    kept: dict[str, Any] = {name: text for name, text in fields.items() if text != ""}
    kept["data"] = json.loads(fields["data"])
    return Delivery.model_validate(kept)

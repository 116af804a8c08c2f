"""Sends one delivery of the outbox, as the Standard Webhooks specification says, and decides what follows.

https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md
"""

import json
import logging
import random
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version

from standardwebhooks import Webhook

from jobs.endpoints import EndpointStore
from jobs.errors import StoreUnavailable
from jobs.keys import KeyStore
from jobs.outbox import Delivery, Outbox
from jobs.settings import Settings
from worker.post import Answer, post

JITTER = 0.2  # of a delay, added at random, so that receivers that fell together don't rise together
LONGEST_DELAY = 86_400.0  # a Retry-After beyond it is cut
LEASE_MARGIN = 15.0  # seconds a delivery's lease lasts beyond twice the timeout: the lookup and the report
MAX_BODY_BYTES = 20_000
log = logging.getLogger(__name__)


class WebhookSender:
    """Takes, signs, posts and settles deliveries. Safe to share between threads."""

    def __init__(
        self,
        outbox: Outbox,
        secrets: Callable[[Delivery], list[str]],
        settings: Settings,
    ) -> None:
        """secrets: what signs a delivery, newest first (`signing_secrets`)."""
        self._outbox, self._secrets = outbox, secrets
        self._allow_loopback = settings.allow_loopback_callbacks
        self._allowed_hosts = settings.local_hosts
        self._schedule = settings.webhook_retry_seconds
        self._timeout = settings.webhook_timeout_seconds

    def send(self, delivery_id: str) -> bool:
        """Make one attempt of one delivery. False: it is another worker's, not due, or has ended."""
        delivery = self._outbox.take(delivery_id, 2 * self._timeout + LEASE_MARGIN)
        if delivery is None:
            return False
        try:
            answer = self._attempt(delivery)
        except StoreUnavailable:
            raise  # nobody can be told: its lease ends by itself
        except Exception as error:  # it must count as a try, or the delivery comes again for ever
            log.exception("delivery %s: the attempt failed on our side", delivery.id)
            answer = Answer(error=f"{type(error).__name__}: {error}")
        if answer is not None:
            self._settle(delivery, answer)
        return True

    def _attempt(self, delivery: Delivery) -> Answer | None:
        """Sign and post. None: nobody is left who could sign, and the delivery was ended."""
        body = body_of(delivery)
        try:
            secrets = self._secrets(delivery)
        except ValueError as error:  # stored under another secret key: the operator may still put it right
            return Answer(error=str(error))
        if not secrets:
            missing = "its endpoint was deleted" if delivery.endpoint else "its API key has no webhook secret"
            self._outbox.dead(delivery.id, attempt=delivery.attempt, error=missing)
            return None
        return post(
            delivery.url,
            body.encode(),
            headers_of(delivery, body, secrets, datetime.now(UTC)),
            allow_loopback=self._allow_loopback,
            allowed_hosts=self._allowed_hosts,
            timeout=self._timeout,
        )

    def _settle(self, delivery: Delivery, answer: Answer) -> None:
        status = answer.status
        if status is not None and 200 <= status < 300:
            self._outbox.delivered(delivery.id, status, attempt=delivery.attempt)
            log.info("delivery %s: %s, try %d: %d", delivery.id, delivery.event, delivery.attempts, status)
        elif status == 410:
            self._outbox.dead(
                delivery.id,
                attempt=delivery.attempt,
                status=410,
                error="the endpoint answered 410 Gone",
                gone=True,
            )
        else:
            self._retry(delivery, answer)

    def _retry(self, delivery: Delivery, answer: Answer) -> None:
        """Due again by the schedule, or later if the receiver asks; past the schedule: the dead letter."""
        problem = answer.error or f"the endpoint answered {answer.status}"
        log.info(
            "delivery %s: %s, try %d failed: %s", delivery.id, delivery.event, delivery.attempts, problem
        )
        if delivery.attempts > len(self._schedule):
            self._outbox.dead(delivery.id, attempt=delivery.attempt, status=answer.status, error=problem)
            return
        delay = self._schedule[delivery.attempts - 1] * (1 + random.uniform(0, JITTER))
        if answer.retry_after is not None:
            delay = max(delay, min(answer.retry_after, LONGEST_DELAY))
        self._outbox.retry(delivery.id, delay, attempt=delivery.attempt, status=answer.status, error=problem)


def signing_secrets(keys: KeyStore, endpoints: EndpointStore) -> Callable[[Delivery], list[str]]:
    """The secrets of a delivery: its endpoint's own, or its API key's for a job's callback."""

    def find(delivery: Delivery) -> list[str]:
        if delivery.endpoint is not None:
            return endpoints.secrets(delivery.endpoint)
        return keys.webhook_secrets(delivery.key_id)

    return find


def body_of(delivery: Delivery) -> str:
    """The payload: type, timestamp of the event, data. The same bytes at every attempt, under 20 kB."""
    stamp = datetime.fromtimestamp(delivery.created_at, UTC).isoformat().replace("+00:00", "Z")
    data = delivery.data
    body = _compact(delivery.event, stamp, data)
    if (
        len(body.encode()) >= MAX_BODY_BYTES
    ):  # job id and state are what a receiver needs; the API has the rest
        kept = {name: data[name] for name in ("id", "state", "model", "attempts", "version") if name in data}
        body = _compact(delivery.event, stamp, kept | {"truncated": True})
    return body


def _compact(event: str, stamp: str, data: dict[str, object]) -> str:
    return json.dumps(
        {"type": event, "timestamp": stamp, "data": data}, ensure_ascii=False, separators=(",", ":")
    )


def headers_of(delivery: Delivery, body: str, secrets: list[str], now: datetime) -> dict[str, str]:
    """The three Standard Webhooks headers, signed with every valid secret (two during a rotation)."""
    signatures = [Webhook(secret).sign(delivery.id, now, body) for secret in secrets]
    return {
        "content-type": "application/json",
        "user-agent": f"reelserve/{version('reelserve')}",
        "webhook-id": delivery.id,
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": " ".join(signatures),
    }

"""Webhooks from the outbox to a raw socket: signatures, order, retries, and what must never be posted to."""

import json
from datetime import UTC, datetime, timedelta

import pytest
import standardwebhooks
import svix

from jobs.client import connect, redis_now
from jobs.endpoints import EndpointStore
from jobs.errors import StoreUnavailable
from jobs.ids import new_id
from jobs.job import JobError, JobState, NewJob, WebhookEvent
from jobs.keys import KeyStore
from jobs.outbox import Delivery, Outbox
from jobs.settings import Settings
from jobs.store import JobStore
from tests.support.jobs import result, video_request
from tests.worker.conftest import SECRET_KEY
from tests.worker.receiver import RawReceiver, Reply
from worker.post import retry_after
from worker.webhooks import JITTER, LONGEST_DELAY, MAX_BODY_BYTES, WebhookSender, body_of, signing_secrets

ALL = tuple(WebhookEvent)

SCHEDULE = Settings().webhook_retry_seconds


class Bench:
    """A store, an outbox, a key and a sender."""

    def __init__(self, settings: Settings, store: JobStore) -> None:
        self.settings, self.redis = settings, connect(settings)
        self.store = store
        self.outbox = Outbox(self.redis, settings)
        self.keys = KeyStore(self.redis, SECRET_KEY)
        self.key, _, self.secret = self.keys.create("test")
        self.endpoints = EndpointStore(self.redis, settings, SECRET_KEY)
        secrets = signing_secrets(self.keys, self.endpoints)
        self.sender = WebhookSender(self.outbox, secrets, settings=settings)

    def submit(self, url: str, events: tuple[WebhookEvent, ...] = ALL, **metadata: str) -> str:
        new = NewJob(
            id=new_id("job"), key_id=self.key.id, request=video_request(), callback_url=url,
            webhook_events=events, metadata=metadata,
        )  # fmt: skip
        return self.store.submit(new)[0].id

    def run(self, job_id: str) -> None:
        job = self.store.claim("tiny", "node-a")
        assert job is not None
        self.store.finish(job_id, job.token, result(job_id, job.token))

    def send_due(self) -> int:
        """One round of what Celery does; how many attempts were made."""
        return sum(self.sender.send(one) for one in self.outbox.due())

    def only(self, job_id: str) -> Delivery:
        (delivery,) = self.outbox.for_job(job_id)
        return delivery

    def make_due(self, delivery_id: str) -> None:
        self.redis.execute_command("ZADD", "reel:outbox", 1, delivery_id)


@pytest.fixture
def bench(settings: Settings, store: JobStore) -> Bench:
    return Bench(settings, store)


def test_both_libraries_verify_the_raw_bytes(bench: Bench) -> None:
    with RawReceiver() as receiver:
        job_id = bench.submit(f"http://127.0.0.1:{receiver.port}/hook?a=b", prompt_note="Ärger ✓")
        bench.run(job_id)
        while bench.send_due():
            pass
        received = receiver.wait(2)
    for one in received:
        for library in (standardwebhooks.Webhook, svix.Webhook):
            library(bench.secret).verify(one.body, one.headers)
        wrong = standardwebhooks.Webhook("whsec_" + "A" * 44)
        with pytest.raises(standardwebhooks.webhooks.WebhookVerificationError):
            wrong.verify(one.body, one.headers)
        assert one.line == "POST /hook?a=b HTTP/1.1"
        assert one.headers["host"] == f"127.0.0.1:{receiver.port}"
        assert one.headers["content-type"] == "application/json"
        assert len(one.body) < MAX_BODY_BYTES
    started, succeeded = (json.loads(one.body) for one in received)
    assert [started["type"], succeeded["type"]] == ["job.started", "job.succeeded"]
    assert (succeeded["data"]["id"], succeeded["data"]["state"]) == (job_id, "succeeded")
    assert succeeded["data"]["metadata"] == {"prompt_note": "Ärger ✓"}
    assert datetime.fromisoformat(succeeded["timestamp"]).tzinfo is not None
    assert len({one.headers["webhook-id"] for one in received}) == 2
    assert {d.state for d in bench.outbox.for_job(job_id)} == {"delivered"}


def test_both_secrets_sign_while_one_is_being_rotated(bench: Bench) -> None:
    fresh = bench.keys.rotate_webhook_secret(bench.key.id)
    with RawReceiver() as receiver:
        bench.run(bench.submit(f"http://localhost:{receiver.port}/", (WebhookEvent.SUCCEEDED,)))
        assert bench.send_due() == 1
        (one,) = receiver.wait(1)
    assert one.headers["host"] == f"localhost:{receiver.port}", "the name, though the address is pinned"
    for secret in (bench.secret, fresh):
        standardwebhooks.Webhook(secret).verify(one.body, one.headers)


@pytest.mark.parametrize(
    ("reply", "least"),
    [
        (Reply(500), SCHEDULE[0]),
        (Reply(404), SCHEDULE[0]),
        (Reply(302, {"location": "http://127.0.0.1:1/"}), SCHEDULE[0]),
        (Reply(429, {"retry-after": "900"}), 900),
        (Reply(503, {"retry-after": "1"}), SCHEDULE[0]),
        (Reply(503, {"retry-after": "9" * 30}), LONGEST_DELAY),
    ],
)
def test_a_failed_attempt_comes_again_with_the_same_id(bench: Bench, reply: Reply, least: float) -> None:
    with RawReceiver(reply, Reply(200)) as receiver:
        job_id = bench.submit(f"http://127.0.0.1:{receiver.port}/", (WebhookEvent.SUCCEEDED,))
        bench.run(job_id)
        before = datetime.now(UTC).timestamp()
        assert bench.send_due() == 1
        waiting = bench.only(job_id)
        assert (waiting.state, waiting.attempts) == ("pending", 1)
        assert f"answered {reply.status}" in waiting.error
        assert waiting.next_at is not None
        delay = waiting.next_at - before
        assert least - 1 <= delay <= least * (1 + JITTER) + 2
        assert bench.send_due() == 0, "not due yet"
        bench.make_due(waiting.id)
        assert bench.send_due() == 1
        first, second = receiver.wait(2)
    assert first.headers["webhook-id"] == second.headers["webhook-id"] == waiting.id
    assert first.body == second.body
    assert bench.only(job_id).state == "delivered"


def test_the_schedule_ends_in_the_dead_letter_and_redelivery_brings_it_back(bench: Bench) -> None:
    with RawReceiver(Reply(503)) as receiver:
        job_id = bench.submit(f"http://127.0.0.1:{receiver.port}/", (WebhookEvent.SUCCEEDED,))
        bench.run(job_id)
        for attempt, delay in enumerate((*SCHEDULE, None), 1):
            delivery = bench.only(job_id)
            bench.make_due(delivery.id)
            before = datetime.now(UTC).timestamp()
            assert bench.send_due() == 1
            delivery = bench.only(job_id)
            assert delivery.attempts == attempt
            if delay is not None:
                assert delivery.next_at is not None
                assert delay - 1 <= delivery.next_at - before <= delay * (1 + JITTER) + 2
        assert (delivery.state, delivery.status) == ("dead", 503)
        assert [d.id for d in bench.outbox.dead_letter()] == [delivery.id]
        receiver.replies = [Reply(204)]
        bench.outbox.redeliver(delivery.id)
        assert bench.send_due() == 1
    assert bench.only(job_id).state == "delivered"


def test_gone_ends_all_of_the_jobs_deliveries(bench: Bench) -> None:
    with RawReceiver(Reply(410)) as receiver:
        url = f"http://127.0.0.1:{receiver.port}/"
        job_id = bench.submit(url)
        bench.run(job_id)
        assert bench.send_due() == 1
        assert bench.send_due() == 0
        assert {d.state for d in bench.outbox.for_job(job_id)} == {"dead"}
        bench.run(bench.submit(url))
        assert bench.send_due() == 0, "the address is not posted to again"
    assert len(receiver.received) == 1


@pytest.mark.parametrize("reply", [Reply(delay=3.0), Reply(drip=0.1)], ids=["silent", "dripping"])
def test_a_receiver_that_hangs_is_cut_off(settings: Settings, store: JobStore, reply: Reply) -> None:
    bench = Bench(settings.model_copy(update={"webhook_timeout_seconds": 0.5}), store)
    with RawReceiver(reply) as receiver:
        job_id = bench.submit(f"http://127.0.0.1:{receiver.port}/", (WebhookEvent.SUCCEEDED,))
        bench.run(job_id)
        began = datetime.now(UTC)
        bench.send_due()
        assert datetime.now(UTC) - began < timedelta(seconds=2)
    delivery = bench.only(job_id)
    assert delivery.state == "pending"
    assert delivery.error


def test_inner_addresses_are_checked_again_at_every_attempt(bench: Bench) -> None:
    for url, words in (
        ("https://10.0.0.1/", "private"),
        ("http://169.254.169.254/latest", "refused"),
        ("http://127.0.0.1:1/", "ConnectError"),
    ):
        job_id = bench.submit(url, (WebhookEvent.SUCCEEDED,))
        bench.run(job_id)
        bench.send_due()
        delivery = bench.only(job_id)
        assert (delivery.state, delivery.status) == ("pending", None)
        assert words in delivery.error


def test_a_revoked_keys_jobs_still_report_and_an_unknown_keys_end(bench: Bench) -> None:
    with RawReceiver() as receiver:
        bench.keys.revoke(bench.key.id)
        job_id = bench.submit(f"http://127.0.0.1:{receiver.port}/", (WebhookEvent.SUCCEEDED,))
        bench.run(job_id)
        bench.send_due()
        assert bench.only(job_id).state == "delivered"
        bench.redis.execute_command("HDEL", "reel:apikeys", bench.key.id)
        job_id = bench.submit(f"http://127.0.0.1:{receiver.port}/", (WebhookEvent.SUCCEEDED,))
        bench.run(job_id)
        bench.send_due()
    delivery = bench.only(job_id)
    assert (delivery.state, delivery.error) == ("dead", "its API key has no webhook secret")


def test_failures_say_why(bench: Bench) -> None:
    with RawReceiver() as receiver:
        job_id = bench.submit(f"http://127.0.0.1:{receiver.port}/", (WebhookEvent.FAILED,))
        job = bench.store.claim("tiny", "node-a")
        assert job is not None
        detail = "x" * 5000
        error = JobError(type="invalid-request", title="No", detail=detail, failure_class="user")
        assert bench.store.fail(job_id, job.token, error).state is JobState.FAILED
        bench.send_due()
        (one,) = receiver.wait(1)
    body = json.loads(one.body)
    assert body["data"]["error"]["type"] == "invalid-request"
    assert len(one.body) < MAX_BODY_BYTES


def test_a_body_that_would_be_too_large_keeps_what_matters() -> None:
    delivery = Delivery(
        id="msg_1", job_id="job_1", key_id="key_1", event="job.succeeded", url="https://a.example",
        state="pending", created_at=1_700_000_000.5,
        data={"id": "job_1", "state": "succeeded", "metadata": {"a": "é" * 12_000}},
    )  # fmt: skip
    body = body_of(delivery)
    assert len(body.encode()) < MAX_BODY_BYTES
    assert json.loads(body)["data"] == {"id": "job_1", "state": "succeeded", "truncated": True}
    assert json.loads(body)["timestamp"] == "2023-11-14T22:13:20.500000Z"


def test_retry_after_is_read_in_both_its_forms() -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    assert retry_after("120", now) == 120
    assert retry_after("Thu, 01 Jan 2026 00:02:00 GMT", now) == 120
    assert retry_after("Thu, 01 Jan 2015 00:02:00 GMT", now) == 0
    for nonsense in (None, "soon", "-5", "", "\u00b2", "\u0663"):
        assert retry_after(nonsense, now) is None


@pytest.mark.parametrize(
    "value",
    [
        "Thu, 01 Jan 99999999999999999999 00:00:00 GMT",
        "Thu, 01 Jan 2026 00:00:00 +99999999999999999999",
        "Mon, 01 Jan 0001 00:00:00 +2359",
        "9" * 5000 + "x",
        ",",
    ],
)
def test_no_retry_after_is_an_error(value: str) -> None:
    retry_after(value)
    assert retry_after("9" * 400) is not None


def test_a_retry_after_that_is_no_number_does_not_repeat_for_ever(bench: Bench) -> None:
    with RawReceiver(Reply(500, {"retry-after": "\u00b2"})) as receiver:
        job_id = bench.submit(f"http://127.0.0.1:{receiver.port}/", (WebhookEvent.SUCCEEDED,))
        bench.run(job_id)
        assert bench.send_due() == 1
    delivery = bench.only(job_id)
    assert (delivery.status, delivery.error) == (500, "the endpoint answered 500")


def test_an_attempt_that_redis_left_is_nobodys_fault_and_its_lease_outlives_any_attempt(bench: Bench) -> None:
    seen: list[Delivery | None] = []

    def away(delivery: Delivery) -> list[str]:
        seen.append(bench.outbox.get(delivery.id))
        raise StoreUnavailable("away")

    job_id = bench.submit("http://127.0.0.1:1/", (WebhookEvent.SUCCEEDED,))
    bench.run(job_id)
    with pytest.raises(StoreUnavailable):
        WebhookSender(bench.outbox, away, settings=bench.settings).send(bench.only(job_id).id)
    assert seen == [bench.only(job_id)], "nothing was written"
    assert seen[0] is not None
    assert seen[0].lease_until is not None
    left = seen[0].lease_until - redis_now(bench.redis)
    assert left > 2 * bench.settings.webhook_timeout_seconds, "else another sender posts it as well"


def test_whatever_goes_wrong_in_an_attempt_is_a_failed_attempt(bench: Bench) -> None:
    """An exception that came out would leave the delivery leased, and its schedule would never end."""

    def bug(delivery: Delivery) -> list[str]:
        raise ZeroDivisionError("a bug of ours")

    sender = WebhookSender(bench.outbox, bug, settings=bench.settings)
    job_id = bench.submit("http://127.0.0.1:1/", (WebhookEvent.SUCCEEDED,))
    bench.run(job_id)
    for _ in range(len(SCHEDULE) + 1):
        assert bench.only(job_id).state == "pending"
        bench.make_due(bench.only(job_id).id)
        assert sender.send(bench.only(job_id).id)
    delivery = bench.only(job_id)
    assert (delivery.state, delivery.error) == ("dead", "ZeroDivisionError: a bug of ours")

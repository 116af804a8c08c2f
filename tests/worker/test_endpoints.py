"""A key's own webhook endpoints: each with its secret, its events and its own order; and what forgers get."""

import json
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import standardwebhooks
import svix

from api.webhook_schemas import WebhookBody
from jobs.endpoints import EndpointStore
from jobs.job import WebhookEvent
from jobs.keys import KeyStore
from jobs.settings import Settings
from jobs.store import JobStore
from jobs.vault import Sealed
from tests.worker.receiver import RawReceiver, Received, Reply
from tests.worker.test_webhooks import ALL, Bench
from worker.webhooks import WebhookSender, signing_secrets

BOTH = (standardwebhooks.Webhook, svix.Webhook)
REFUSED = (standardwebhooks.webhooks.WebhookVerificationError, svix.webhooks.WebhookVerificationError)
DONE = (WebhookEvent.SUCCEEDED,)


@pytest.fixture
def bench(settings: Settings, store: JobStore) -> Bench:
    return Bench(settings, store)


def add(bench: Bench, port: int, events: tuple[WebhookEvent, ...] = DONE) -> tuple[Any, str]:
    made = bench.endpoints.add(bench.key.id, f"http://127.0.0.1:{port}/", events)
    assert made is not None
    return made


def send_all(bench: Bench) -> None:
    while bench.send_due():
        pass


def one_delivery(bench: Bench) -> tuple[Received, str]:
    """A real delivery off a socket, and the secret that signed it."""
    with RawReceiver() as receiver:
        _, secret = add(bench, receiver.port)
        bench.run(bench.submit("http://127.0.0.1:1/", ()))
        send_all(bench)
        (one,) = receiver.wait(1)
    return one, secret


def flipped(one: Received) -> Received:
    body = bytearray(one.body)
    body[len(body) // 2] ^= 1
    return Received(one.line, one.headers, bytes(body))


def serialised_again(one: Received) -> Received:
    return Received(one.line, one.headers, json.dumps(json.loads(one.body), indent=1).encode())


def other_id(one: Received) -> Received:
    return Received(one.line, one.headers | {"webhook-id": "msg_other"}, one.body)


def re_signed(one: Received, secret: str, age: float) -> Received:
    """The same delivery as if it was signed `age` seconds ago."""
    then = datetime.now(UTC) - timedelta(seconds=age)
    signature = standardwebhooks.Webhook(secret).sign(one.headers["webhook-id"], then, one.body.decode())
    fresh = {"webhook-timestamp": str(int(then.timestamp())), "webhook-signature": signature}
    return Received(one.line, one.headers | fresh, one.body)


@pytest.mark.parametrize("library", BOTH, ids=["standardwebhooks", "svix"])
def test_forgeries_are_refused(bench: Bench, library: Callable[[str], Any]) -> None:
    """From the raw bytes of a socket; the same bytes untouched are accepted, and 290 s old as well."""
    one, secret = one_delivery(bench)
    library(secret).verify(one.body, one.headers)
    fresh = re_signed(one, secret, 290)
    library(secret).verify(fresh.body, fresh.headers)
    old = re_signed(one, secret, 301)
    bare = Received(one.line, {k: v for k, v in one.headers.items() if k != "webhook-signature"}, one.body)
    for forged in (flipped(one), serialised_again(one), other_id(one), old, bare):
        with pytest.raises(REFUSED):
            library(secret).verify(forged.body, forged.headers)
    for wrong in (bench.secret, "whsec_" + "A" * 44):  # the key's own secret is not the endpoint's
        with pytest.raises(REFUSED):
            library(wrong).verify(one.body, one.headers)


def test_callback_and_endpoints_each_get_what_they_asked_for(bench: Bench) -> None:
    with RawReceiver() as own, RawReceiver() as first, RawReceiver() as second:
        one, secret_one = add(bench, first.port, (WebhookEvent.STARTED, WebhookEvent.SUCCEEDED))
        _, secret_two = add(bench, second.port, (WebhookEvent.FAILED, WebhookEvent.SUCCEEDED))
        bench.run(bench.submit(f"http://127.0.0.1:{own.port}/", DONE, ref="r"))
        send_all(bench)
        got = {"own": own.wait(1), "first": first.wait(2), "second": second.wait(1)}
    secrets = {"own": bench.secret, "first": secret_one, "second": secret_two}
    for name, received in got.items():
        for item in received:
            standardwebhooks.Webhook(secrets[name]).verify(item.body, item.headers)
            WebhookBody.model_validate_json(item.body)  # as the OpenAPI document says
    events = {name: [json.loads(item.body)["type"] for item in items] for name, items in got.items()}
    assert events == {
        "own": ["job.succeeded"], "first": ["job.started", "job.succeeded"], "second": ["job.succeeded"],
    }  # fmt: skip
    ids = [item.headers["webhook-id"] for items in got.values() for item in items]
    assert len(set(ids)) == 4
    log = bench.outbox.for_endpoint(one.id)
    assert [(item.event, item.state, item.status) for item in log] == [
        ("job.succeeded", "delivered", 204), ("job.started", "delivered", 204),
    ]  # fmt: skip
    assert json.loads(got["first"][1].body)["data"]["metadata"] == {"ref": "r"}


def test_a_receiver_that_is_down_holds_up_nobody_else(bench: Bench) -> None:
    with RawReceiver(Reply(500)) as down, RawReceiver() as up:
        add(bench, down.port, ALL)
        endpoint, _ = add(bench, up.port, ALL)
        job_id = bench.submit("http://127.0.0.1:1/", ())
        bench.run(job_id)
        send_all(bench)
        assert [item.line for item in up.wait(2)]
        assert len(down.received) == 1, "its second event waits for its first"
    assert {item.state for item in bench.outbox.for_endpoint(endpoint.id)} == {"delivered"}
    assert sorted(item.state for item in bench.outbox.for_job(job_id)) == ["delivered"] * 2 + ["pending"] * 2


def test_an_endpoint_that_is_gone_is_left_alone_and_a_test_reopens_it(bench: Bench) -> None:
    with RawReceiver(Reply(410), Reply(204)) as receiver:
        endpoint, _ = add(bench, receiver.port)
        bench.run(bench.submit("http://127.0.0.1:1/", ()))
        send_all(bench)
        bench.run(bench.submit("http://127.0.0.1:1/", ()))
        send_all(bench)
        assert len(receiver.received) == 1
        assert bench.outbox.gone(endpoint.url)
        pinged = bench.outbox.ping(endpoint)
        send_all(bench)
        assert not bench.outbox.gone(endpoint.url)
        last = receiver.wait(2)[-1]
    assert json.loads(last.body)["type"] == "webhook.test"
    assert last.headers["webhook-id"] == pinged.id
    assert (pinged.job_id, pinged.endpoint) == (None, endpoint.id)
    assert bench.outbox.for_endpoint(endpoint.id)[0].state == "delivered"


def test_both_secrets_sign_while_an_endpoints_is_rotated_and_no_third(bench: Bench) -> None:
    with RawReceiver() as receiver:
        endpoint, oldest = add(bench, receiver.port)
        old = bench.endpoints.rotate(endpoint)
        new = bench.endpoints.rotate(endpoint)
        bench.outbox.ping(endpoint)
        send_all(bench)
        (one,) = receiver.wait(1)
    for secret in (old, new):
        standardwebhooks.Webhook(secret).verify(one.body, one.headers)
    with pytest.raises(REFUSED):
        standardwebhooks.Webhook(oldest).verify(one.body, one.headers)
    bench.endpoints.rotate(endpoint, overlap_seconds=0.05)
    time.sleep(0.06)
    assert len(bench.endpoints.secrets(endpoint.id)) == 1


def test_of_two_rotations_at_once_neither_is_lost(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process rotates the endpoint's secret between a rotation's read and its write."""
    endpoint, _ = add(bench, 1)
    vault, between = bench.endpoints._vault, list[str | None]()
    rotate = vault.rotate

    def late(sealed: Sealed, overlap_seconds: float) -> tuple[str, Sealed]:
        if not between:
            between.append(None)
            between[0] = bench.endpoints.rotate(endpoint)
        return rotate(sealed, overlap_seconds)

    monkeypatch.setattr(vault, "rotate", late)
    assert bench.endpoints.rotate(endpoint) == bench.endpoints.secrets(endpoint.id)[0]
    assert between[0] == bench.endpoints.secrets(endpoint.id)[1]


def test_a_deleted_endpoint_s_secret_is_not_made_again(bench: Bench) -> None:
    endpoint, _ = add(bench, 1)
    assert bench.endpoints.remove(bench.key.id, endpoint.id)
    assert bench.endpoints.rotate(endpoint) is None
    assert bench.endpoints.secrets(endpoint.id) == []


def test_a_secret_under_another_key_is_waited_for(bench: Bench) -> None:
    """The operator set the wrong REEL_SECRET_KEY: once it is right, every delivery goes out."""
    with RawReceiver() as receiver:
        add(bench, receiver.port)
        job_id = bench.submit(f"http://127.0.0.1:{receiver.port}/", DONE)
        bench.run(job_id)
        wrong = "another secret key for tests"
        secrets = signing_secrets(
            KeyStore(bench.redis, wrong), EndpointStore(bench.redis, bench.settings, wrong)
        )
        sender = WebhookSender(bench.outbox, secrets, settings=bench.settings)
        assert [sender.send(one) for one in bench.outbox.due()] == [True, True]
        for delivery in bench.outbox.for_job(job_id):
            assert delivery.state == "pending"
            assert "REEL_SECRET_KEY" in delivery.error
            bench.make_due(delivery.id)
        send_all(bench)
        receiver.wait(2)
    assert {delivery.state for delivery in bench.outbox.for_job(job_id)} == {"delivered"}


def test_a_deleted_endpoint_hears_nothing_more(bench: Bench) -> None:
    with RawReceiver() as receiver:
        endpoint, _ = add(bench, receiver.port)
        job_id = bench.submit("http://127.0.0.1:1/", ())
        bench.run(job_id)
        assert bench.endpoints.remove(bench.key.id, endpoint.id)
        send_all(bench)
        assert receiver.received == []
    delivery = bench.only(job_id)
    assert (delivery.state, delivery.error) == ("dead", "its endpoint was deleted")
    silenced, _ = add(bench, 1)
    assert bench.endpoints.change(bench.key.id, silenced.id, enabled=False)
    quiet = bench.submit("http://127.0.0.1:1/", ())
    bench.run(quiet)
    assert bench.outbox.for_job(quiet) == []


def test_a_record_of_another_release_is_changed_and_keeps_its_fields(bench: Bench) -> None:
    endpoint, _ = add(bench, 1)
    place = (f"reel:endpoints:{bench.key.id}", endpoint.id)
    record = {**json.loads(endpoint.model_dump_json()), "later": "x"}
    del record["description"]
    bench.redis.execute_command("HSET", *place, json.dumps(record))
    changed = bench.endpoints.change(bench.key.id, endpoint.id, events=ALL)
    assert changed == bench.endpoints.get(bench.key.id, endpoint.id)
    assert changed is not None
    assert set(changed.events) == set(ALL)
    assert json.loads(bench.redis.execute_command("HGET", *place)) == {**record, "events": list(ALL)}
    assert bench.endpoints.change("key_other", endpoint.id, enabled=False) is None


def test_ten_endpoints_a_key_and_nothing_readable_stored(bench: Bench) -> None:
    secrets = [add(bench, 1)[1] for _ in range(10)]
    assert bench.endpoints.add(bench.key.id, "https://a.example/", DONE) is None
    assert len(bench.endpoints.list(bench.key.id)) == 10
    assert bench.endpoints.list("key_other") == []
    everything = "".join(
        str(bench.redis.execute_command("HGETALL", name))
        for name in bench.redis.execute_command("KEYS", "reel:*")
        if bench.redis.execute_command("TYPE", name) == "hash"
    )
    assert "we_" in everything
    for secret in secrets:
        assert secret.removeprefix("whsec_") not in everything
    assert bench.redis.execute_command("HLEN", "reel:apikeys:endpoints") == 10


def test_a_purged_job_waits_for_its_endpoints_too(bench: Bench) -> None:
    add(bench, 1)
    job_id = bench.submit("http://127.0.0.1:1/", ())
    bench.run(job_id)
    bench.redis.execute_command("ZADD", "reel:retention", 1, job_id)
    assert bench.store.sweep().purged == [], "a webhook is still under way"
    (delivery,) = bench.outbox.for_job(job_id)
    taken = bench.outbox.take(delivery.id, 30)
    assert taken is not None
    assert bench.outbox.dead(delivery.id, attempt=taken.attempt)
    bench.redis.execute_command("ZADD", "reel:retention", 1, job_id)
    assert bench.store.sweep().purged == [job_id]
    assert bench.redis.execute_command("TTL", f"reel:delivery:{delivery.id}") > 0

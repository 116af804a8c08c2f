"""Webhook deliveries: made with the change, leased to one sender, in order, never dropped silently."""

import threading
import time

from jobs.endpoints import Endpoint
from jobs.job import JobState, WebhookEvent
from jobs.outbox import Delivery, Outbox
from jobs.store import JobStore
from tests.jobs.conftest import MakeStore
from tests.support.jobs import new_job, result

URL = "https://example.com/hook"
ALL = tuple(WebhookEvent)


def submit(store: JobStore, events: tuple[WebhookEvent, ...] = ALL, **more: object) -> str:
    return store.submit(new_job(callback_url=URL, webhook_events=events, **more))[0].id


def run(store: JobStore, job_id: str, steps: int = 1) -> None:
    job = store.claim("tiny", "node")
    assert job is not None
    assert job.id == job_id
    for step in range(steps):
        store.heartbeat(job_id, job.token, phase="denoising", step=step + 1, progress=step / 10)
    store.finish(job_id, job.token, result())


def take(outbox: Outbox, seconds: float = 30) -> Delivery:
    delivery = outbox.take(outbox.due()[0], seconds)
    assert delivery is not None
    return delivery


def test_only_wanted_events_are_delivered(store: JobStore, outbox: Outbox) -> None:
    job_id = submit(store, (WebhookEvent.STARTED, WebhookEvent.SUCCEEDED))
    run(store, job_id)
    assert [d.event for d in outbox.for_job(job_id)] == ["job.started", "job.succeeded"]
    silent = store.submit(new_job())[0].id
    run(store, silent)
    assert outbox.for_job(silent) == []


def test_the_payload_is_the_job_as_it_was_then(store: JobStore, outbox: Outbox) -> None:
    job_id = submit(store, metadata={"ref": "r/1", "ü": '"'})
    run(store, job_id)
    started, progress, done = outbox.for_job(job_id)
    assert [started.data["state"], progress.data["state"], done.data["state"]] == [
        "running",
        "running",
        "succeeded",
    ]
    assert started.data["id"] == job_id
    assert done.data["metadata"] == {"ref": "r/1", "ü": '"'}
    assert (started.url, started.key_id, started.state, started.attempts) == (URL, "key_a", "pending", 0)
    assert len({started.id, progress.id, done.id}) == 3
    assert all(d.id.startswith("msg_") for d in (started, progress, done))


def test_no_metadata_is_an_empty_object(store: JobStore, outbox: Outbox) -> None:
    job_id = submit(store)
    store.cancel(job_id)
    assert outbox.for_job(job_id)[0].data["metadata"] == {}


def test_deliveries_of_a_job_go_in_order(store: JobStore, outbox: Outbox) -> None:
    job_id = submit(store)
    run(store, job_id)
    sent = []
    while outbox.due():
        assert len(outbox.due()) == 1
        delivery = take(outbox)
        if len(sent) == 0 and delivery.attempt == 1:
            assert outbox.retry(delivery.id, 0, attempt=delivery.attempt, status=503, error="busy")
            continue
        assert outbox.delivered(delivery.id, 200, attempt=delivery.attempt)
        sent.append(delivery.event)
    assert sent == ["job.started", "job.progress", "job.succeeded"]
    assert [(d.state, d.status) for d in outbox.for_job(job_id)] == [("delivered", 200)] * 3
    assert outbox.pending() == 0
    assert store.redis.execute_command("HGETALL", "reel:outcomes") == {"retry": "1", "delivered": "3"}


def test_jobs_do_not_wait_for_each_other(store: JobStore, outbox: Outbox) -> None:
    ids = [submit(store) for _ in range(3)]
    for job_id in ids:
        store.cancel(job_id)
    assert len(outbox.due()) == 3


def test_one_sender_at_a_time(store: JobStore, outbox: Outbox) -> None:
    for _ in range(20):
        store.cancel(submit(store))
    taken: list[str] = []

    def send() -> None:
        for delivery_id in outbox.due():
            if outbox.take(delivery_id, 30):
                taken.append(delivery_id)

    threads = [threading.Thread(target=send) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == len(set(taken)) == 20


def test_a_dead_sender_s_delivery_becomes_due_again(store: JobStore, outbox: Outbox) -> None:
    store.cancel(submit(store))
    first = take(outbox, 0.5)
    assert outbox.due() == []
    time.sleep(0.55)
    second = take(outbox)
    assert (second.id, second.attempt, second.attempts) == (first.id, 2, 2)
    # the first one was only slow: it may no longer reschedule or kill, but a success is one
    assert not outbox.retry(first.id, 60, attempt=first.attempt)
    assert not outbox.dead(first.id, attempt=first.attempt, error="late")
    assert outbox.delivered(first.id, 200, attempt=first.attempt)
    assert not outbox.delivered(second.id, 200, attempt=second.attempt)


def test_a_retry_waits_its_time(store: JobStore, outbox: Outbox) -> None:
    job_id = submit(store)
    store.cancel(job_id)
    delivery = take(outbox)
    assert outbox.retry(delivery.id, 0.5, attempt=delivery.attempt, status=500, error="x" * 9999)
    assert outbox.due() == []
    assert outbox.take(delivery.id, 30) is None
    time.sleep(0.55)
    assert outbox.due() == [delivery.id]
    kept = outbox.get(delivery.id)
    assert kept is not None
    assert (kept.status, len(kept.error), kept.data) == (500, 500, delivery.data)


def test_the_next_one_follows_a_dead_one(store: JobStore, outbox: Outbox) -> None:
    job_id = submit(store)
    run(store, job_id)
    first = take(outbox)
    assert outbox.dead(first.id, attempt=first.attempt, status=500, error="gave up")
    assert [d.id for d in outbox.dead_letter()] == [first.id]
    assert take(outbox).event == "job.progress"


def test_an_address_that_is_gone_gets_no_more(store: JobStore, outbox: Outbox) -> None:
    job_id = submit(store)
    run(store, job_id)
    first = take(outbox)
    assert outbox.dead(first.id, attempt=first.attempt, status=410, error="gone", gone=True)
    assert [d.state for d in outbox.for_job(job_id)] == ["dead"] * 3
    other = submit(store)
    store.cancel(other)
    assert [d.state for d in outbox.for_job(other)] == ["dead"]
    assert outbox.due() == []
    assert len(outbox.dead_letter()) == 4


def test_redelivery_keeps_the_id_and_queues_behind(store: JobStore, outbox: Outbox) -> None:
    job_id = submit(store)
    run(store, job_id)
    first = take(outbox)
    outbox.dead(first.id, attempt=first.attempt, status=410, gone=True)
    assert outbox.gone(URL)
    for delivery in outbox.for_job(job_id):
        assert outbox.redeliver(delivery.id)
    assert not outbox.gone(URL), "somebody says that the address is good again"
    assert outbox.dead_letter() == []
    again = take(outbox)
    assert (again.id, again.attempts, again.data) == (first.id, 1, first.data)
    assert again.attempt == first.attempt + 1
    assert outbox.due() == []
    assert not outbox.redeliver("msg_nothing")


def test_redelivery_of_one_that_waits_makes_it_due(store: JobStore, outbox: Outbox) -> None:
    store.cancel(submit(store))
    delivery = take(outbox)
    assert outbox.redeliver(delivery.id)
    assert outbox.due() == []  # under way: left alone
    outbox.retry(delivery.id, 600, attempt=delivery.attempt)
    assert outbox.redeliver(delivery.id)
    assert outbox.due() == [delivery.id]


def test_progress_is_throttled(make_store: MakeStore) -> None:
    store = make_store(webhook_progress_seconds=0.2)
    outbox = Outbox(store.redis, store.settings)
    job_id = submit(store, (WebhookEvent.PROGRESS,))
    job = store.claim("tiny", "node")
    assert job is not None
    began = time.monotonic()
    for step in range(30):
        store.heartbeat(job_id, job.token, phase="denoising", step=step + 1, progress=step / 30)
        for due in outbox.due():
            delivery = outbox.take(due, 30)
            assert delivery is not None
            outbox.delivered(due, 200, attempt=delivery.attempt)
        time.sleep(0.02)
    assert 3 <= len(outbox.for_job(job_id)) <= (time.monotonic() - began) / 0.2 + 1


def test_a_slow_receiver_gets_no_heap_of_progress(make_store: MakeStore) -> None:
    store = make_store(webhook_progress_seconds=0.001)
    outbox = Outbox(store.redis, store.settings)
    job_id = submit(store)
    job = store.claim("tiny", "node")
    assert job is not None
    for step in range(20):
        store.heartbeat(job_id, job.token, phase="denoising", step=step + 1, progress=step / 30)
        time.sleep(0.002)
    assert [d.event for d in outbox.for_job(job_id)] == ["job.started", "job.progress"]


def test_webhooks_outlive_a_deleted_job(store: JobStore, outbox: Outbox) -> None:
    job_id = submit(store)
    store.cancel(job_id)
    store.delete(job_id)
    delivery = take(outbox)
    assert outbox.delivered(delivery.id, 204, attempt=delivery.attempt)
    for key in store.redis.execute_command("KEYS", "reel:*deliver*"):
        assert store.redis.execute_command("TTL", key) > 0


def test_every_end_is_told(store: JobStore, outbox: Outbox) -> None:
    ids = {state: submit(store, deadline_seconds=1000) for state in ("canceled", "succeeded")}
    store.cancel(ids["canceled"])
    run(store, ids["succeeded"])
    for state, job_id in ids.items():
        assert store.get(job_id).state == JobState(state)
        assert outbox.for_job(job_id)[-1].event == f"job.{state}"


def test_a_test_event_that_expired_holds_up_no_later_one(store: JobStore, outbox: Outbox) -> None:
    """Endpoints' chains have no end: what waits behind an expired head would never be sent."""
    endpoint = Endpoint(id="we_" + "0" * 25, key_id="key_a", url=URL, events=(), created_at=1.0)
    first = outbox.ping(endpoint)
    taken = take(outbox)
    outbox.retry(first.id, 600, attempt=taken.attempt, status=500)
    second = outbox.ping(endpoint)
    assert outbox.due() == []
    store.redis.execute_command("DEL", f"reel:delivery:{first.id}")
    store.redis.execute_command("ZADD", "reel:outbox", 1, first.id)
    assert outbox.take(first.id, 30) is None
    assert take(outbox).id == second.id
    # by another way: the head went and no sender has looked since
    third = outbox.ping(endpoint)
    store.redis.execute_command("DEL", f"reel:delivery:{second.id}")
    store.redis.execute_command("ZREM", "reel:outbox", second.id)
    outbox.ping(endpoint)
    assert outbox.due() == [third.id]


def test_the_dead_letter_forgets_in_time(make_store: MakeStore) -> None:
    """Test events, and deliveries that end after their job was deleted, have no purge that takes them out."""
    store = make_store(retention_seconds=60)
    outbox = Outbox(store.redis, store.settings)
    ids = []
    for _ in range(2):
        job_id = submit(store, (WebhookEvent.CANCELED,))
        store.cancel(job_id)
        store.delete(job_id)
        delivery = take(outbox)
        outbox.dead(delivery.id, attempt=delivery.attempt, error="gave up")
        ids.append(delivery.id)
    store.sweep()
    assert {one.id for one in outbox.dead_letter()} == set(ids)
    store.redis.execute_command("ZINCRBY", "reel:outbox:dead", -61, ids[0])
    store.sweep()
    assert store.redis.execute_command("ZRANGE", "reel:outbox:dead", 0, -1) == [ids[1]]

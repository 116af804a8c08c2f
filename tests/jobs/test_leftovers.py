"""What Redis keeps beside the jobs has an end or a limit: wake-ups, ranks of lanes, answers, marks."""

import pytest

from jobs.client import redis_now
from jobs.endpoints import Endpoint
from jobs.job import JobError, Priority
from jobs.outbox import Outbox
from jobs.scripts import ENDPOINT_LOG
from jobs.store import JobStore
from jobs.sweep import garbage_later
from tests.jobs.conftest import MakeStore
from tests.support.jobs import new_job
from tests.support.redis import rewind

URL = "https://example.com/hook"
ENDPOINT = Endpoint(id="we_" + "0" * 25, key_id="key_a", url=URL, events=(), created_at=1.0)
P = Priority


def left(store: JobStore, *names: str) -> list[str]:
    """Those of the keys that exist."""
    return [name for name in names if store.redis.execute_command("EXISTS", f"reel:{name}")]


def test_wake_ups_are_bounded_and_end(store: JobStore) -> None:
    """No node sleeps on them: they would only heap up."""
    store.redis.execute_command("LPUSH", "reel:wake:tiny", *["1"] * 100)
    store.submit(new_job())
    assert store.redis.execute_command("LLEN", "reel:wake:tiny") == 64
    assert 0 < store.redis.execute_command("TTL", "reel:wake:tiny") <= 3600


def test_when_nobody_waits_no_rank_is_left(store: JobStore) -> None:
    """Also when the last one did not start."""
    for _ in range(2):
        store.submit(new_job(priority=P.LOW))
    started = store.claim("tiny", "node")
    assert started is not None
    assert left(store, "vtime:tiny")
    (last,) = (job for job in store.list("*")[0] if job.id != started.id)
    store.cancel(last.id)
    assert not left(store, "vtime:tiny", "lanes:tiny", "rising:tiny")


def test_a_lane_at_the_top_rises_no_more(store: JobStore) -> None:
    """64 lanes that came due for ever would keep all others from rising."""
    job, _ = store.submit(new_job())
    store.redis.execute_command("ZADD", f"reel:lane:tiny:1:{job.key_id}", 1, job.id)  # has waited since 1970
    store.redis.execute_command("ZADD", "reel:rising:tiny", 1, f"1:{job.key_id}")
    assert store.scripts.run("rise", "tiny") == 1
    assert store.scripts.run("rise", "tiny") == 0


def test_a_claims_note_for_a_lost_reply_ends_with_the_lease(store: JobStore) -> None:
    store.submit(new_job())
    store.claim("tiny", "node")
    (note,) = store.redis.execute_command("KEYS", "reel:claim:*")
    assert 0 < store.redis.execute_command("PTTL", note) <= store.settings.lease_seconds * 1000


@pytest.mark.parametrize("by", ["claim", "cancel", "reject"])
def test_only_jobs_that_may_expire_have_a_deadline_to_look_at(store: JobStore, by: str) -> None:
    job, _ = store.submit(new_job(deadline_seconds=1000))
    assert left(store, "deadlines")
    if by == "claim":
        store.claim("tiny", "node")
    elif by == "cancel":
        store.cancel(job.id)
    else:
        store.reject(job.id, JobError(type="x", title="x", detail="x"))
    assert not left(store, "deadlines")


def test_a_vanished_jobs_lease_goes_with_the_sweep(store: JobStore) -> None:
    store.redis.execute_command("SADD", "reel:queues", "tiny")
    store.redis.execute_command("ZADD", "reel:leases:tiny", 1, "job_nowhere")
    assert store.sweep().total == 0
    assert not left(store, "leases:tiny")


def test_an_ended_jobs_retention_is_the_settings(make_store: MakeStore) -> None:
    store = make_store(retention_seconds=5000)
    job = store.cancel(store.submit(new_job())[0].id)
    assert job.finished_at is not None
    due = float(store.redis.execute_command("ZSCORE", "reel:retention", job.id))
    assert due - job.finished_at == pytest.approx(5000, abs=1e-3)


def test_a_purge_looks_again_and_comes_back_in_a_minute(store: JobStore) -> None:
    plain, job = (store.cancel(store.submit(new_job(callback_url=url))[0].id) for url in (None, URL))
    assert store.scripts.run("purge", plain.id) == ["none"], "not due: a sweep read an old list"
    rewind(store.redis, job.id, retention=True)
    assert store.sweep().purged == [], "its webhook is under way"
    again = float(store.redis.execute_command("ZSCORE", "reel:retention", job.id))
    assert again - redis_now(store.redis) == pytest.approx(60, abs=10)


def test_a_deleted_job_leaves_no_dead_letter_and_its_webhooks_end(store: JobStore, outbox: Outbox) -> None:
    given_up, waiting = (store.submit(new_job(callback_url=URL))[0].id for _ in range(2))
    store.reject(given_up, JobError(type="x", title="x", detail="x"))
    (due,) = outbox.due()
    delivery = outbox.take(due, 30)
    assert delivery is not None
    assert outbox.dead(due, attempt=delivery.attempt)
    assert left(store, "dead", "outbox:dead") == ["dead", "outbox:dead"]
    store.delete(given_up)
    assert not left(store, "dead", "outbox:dead")
    store.cancel(waiting)
    store.delete(waiting)
    for key in (f"pending:{waiting}", f"deliveries:{waiting}"):
        assert 0 < store.redis.execute_command("TTL", f"reel:{key}") <= store.settings.retention_seconds


def test_a_test_events_keys_end_by_themselves(store: JobStore, outbox: Outbox) -> None:
    sent = outbox.ping(ENDPOINT)
    keep = store.settings.retention_seconds
    for key in (f"delivery:{sent.id}", f"pending:{ENDPOINT.id}"):
        assert 0 < store.redis.execute_command("TTL", f"reel:{key}") <= keep
    assert keep < store.redis.execute_command("TTL", f"reel:deliveries:{ENDPOINT.id}") <= 2 * keep


def test_an_endpoints_log_is_bounded(store: JobStore, outbox: Outbox) -> None:
    log = f"reel:deliveries:{ENDPOINT.id}"
    store.redis.execute_command("RPUSH", log, *["msg_old"] * ENDPOINT_LOG)
    newest = outbox.ping(ENDPOINT)
    assert store.redis.execute_command("LLEN", log) == ENDPOINT_LOG
    assert outbox.for_endpoint(ENDPOINT.id) == [newest]


def test_an_address_that_is_gone_is_tried_again_after_a_day(store: JobStore, outbox: Outbox) -> None:
    store.cancel(store.submit(new_job(callback_url=URL))[0].id)
    (due,) = outbox.due()
    taken = outbox.take(due, 30)
    assert taken is not None
    outbox.dead(due, attempt=taken.attempt, status=410, gone=True)
    assert outbox.gone(URL)
    (mark,) = store.redis.execute_command("KEYS", "reel:gone:*")
    assert 86_000 < store.redis.execute_command("TTL", mark) <= 86_400


def test_a_deleted_jobs_webhook_that_is_sent_again_still_ends(store: JobStore, outbox: Outbox) -> None:
    job_id = store.submit(new_job(callback_url=URL))[0].id
    store.cancel(job_id)
    (due,) = outbox.due()
    taken = outbox.take(due, 30)
    assert taken is not None
    outbox.delivered(due, 200, attempt=taken.attempt)
    store.delete(job_id)
    assert outbox.redeliver(due)
    assert outbox.due() == [due]
    assert (
        0 < store.redis.execute_command("TTL", f"reel:pending:{job_id}") <= store.settings.retention_seconds
    )


def test_files_that_are_gone_are_not_put_off(store: JobStore) -> None:
    """Two cleaners at once: the one that failed comes after the one that removed them."""
    garbage_later(store.redis, "job_removed")
    assert store.garbage() == []

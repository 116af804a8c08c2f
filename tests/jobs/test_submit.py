"""Accepting jobs: idempotency, limits, and a script that is sent twice."""

import threading
import time

import pytest

from jobs.errors import IdempotencyConflict, JobNotFound, QueueFull
from jobs.job import Job, JobState, Priority, WebhookEvent
from jobs.store import JobStore
from tests.jobs.conftest import MakeStore
from tests.support.jobs import new_job, result, video_request


def test_everything_that_was_given_is_kept(store: JobStore) -> None:
    request = video_request(
        prompt='Ein "Bär" läuft\n\u2028🐻', negative_prompt="blurry", image="uploads/k/img_1.png"
    )
    new = new_job(
        request=request,
        priority=Priority.LOW,
        deadline_seconds=60.5,
        callback_url="https://example.com/hook?a=1&b=ü",
        webhook_events=(WebhookEvent.STARTED,),
        metadata={"ref": "order 7/ü", "other": ""},
    )
    job, created = store.submit(new)
    assert created
    assert job == store.get(new.id)
    given = new.model_dump(exclude={"deadline_seconds", "idempotency_key", "body_hash", "max_outstanding"})
    assert given.items() <= job.model_dump().items()
    assert job.deadline_at is not None
    assert job.deadline_at - job.created_at == pytest.approx(60.5, abs=1e-3)
    assert (job.state, job.version, job.attempts, job.token) == (JobState.QUEUED, 1, 0, 0)
    assert abs(job.created_at - time.time()) < 60


def test_the_same_key_and_body_is_the_same_job(store: JobStore) -> None:
    first, created = store.submit(new_job(idempotency_key="k", body_hash="h"))
    again, created_again = store.submit(new_job(idempotency_key="k", body_hash="h"))
    assert (created, created_again) == (True, False)
    assert again == first
    assert sum(row.waiting for row in store.queue_stats()) == 1


def test_the_same_key_and_another_body_is_a_conflict(store: JobStore) -> None:
    first, _ = store.submit(new_job(idempotency_key="k", body_hash="h"))
    with pytest.raises(IdempotencyConflict, match=first.id):
        store.submit(new_job(idempotency_key="k", body_hash="other"))
    with pytest.raises(IdempotencyConflict, match=first.id):
        store.submitted("key_a", "k", "other")
    assert store.submitted("key_a", "k", "h") == first
    assert store.submitted("key_b", "k", "h") is None


def test_idempotency_keys_belong_to_one_api_key(store: JobStore) -> None:
    for key in ("key_a", "key_b"):
        assert store.submit(new_job(key, idempotency_key="k", body_hash=key))[1]


def test_racing_requests_make_one_job(store: JobStore) -> None:
    answers: list[tuple[Job, bool]] = []
    barrier = threading.Barrier(8)

    def send() -> None:
        barrier.wait()
        answers.append(store.submit(new_job(idempotency_key="k", body_hash="h")))

    threads = [threading.Thread(target=send) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({job.id for job, _ in answers}) == 1
    assert [created for _, created in answers].count(True) == 1


def test_a_replay_shows_the_job_as_it_is_now(store: JobStore) -> None:
    first, _ = store.submit(new_job(idempotency_key="k", body_hash="h"))
    store.cancel(first.id)
    again, created = store.submit(new_job(idempotency_key="k", body_hash="h"))
    assert (again.state, created) == (JobState.CANCELED, False)


def test_the_replay_of_a_deleted_job_makes_a_new_one(store: JobStore) -> None:
    first, _ = store.submit(new_job(idempotency_key="k", body_hash="h"))
    store.cancel(first.id)
    store.delete(first.id)
    again, created = store.submit(new_job(idempotency_key="k", body_hash="h"))
    assert created
    assert again.id != first.id


def test_the_idempotency_key_is_forgotten_in_time(make_store: MakeStore) -> None:
    store = make_store(idempotency_seconds=60)
    store.submit(new_job(idempotency_key="k", body_hash="h"))
    assert 55 < store.redis.execute_command("TTL", "reel:idem:key_a:k") <= 60


def test_sent_twice_stored_once(store: JobStore) -> None:
    """As the client does when the first reply was lost: the same id again."""
    new = new_job()
    assert store.submit(new)[1]
    assert store.submit(new)[1]
    assert sum(row.waiting for row in store.queue_stats()) == 1


def test_a_key_s_limit_counts_waiting_and_running(make_store: MakeStore) -> None:
    store = make_store(max_outstanding_per_key=2)
    store.submit(new_job())
    running = store.claim("tiny", "node")
    assert running is not None
    store.submit(new_job())
    with pytest.raises(QueueFull, match="this API key already has 2") as caught:
        store.submit(new_job())
    assert (caught.value.limit, caught.value.scope) == (2, "this API key")
    store.submit(new_job("key_b"))
    store.finish(running.id, running.token, result())
    store.submit(new_job())


def test_a_key_may_have_its_own_limit(store: JobStore) -> None:
    store.submit(new_job(max_outstanding=1))
    with pytest.raises(QueueFull):
        store.submit(new_job(max_outstanding=1))
    store.submit(new_job())


def test_the_queue_has_a_cap(make_store: MakeStore) -> None:
    store = make_store(max_queued=2)
    store.submit(new_job("key_a"))
    store.submit(new_job("key_b"))
    with pytest.raises(QueueFull, match="the queue already has 2"):
        store.submit(new_job("key_c"))


def test_a_refused_job_leaves_nothing(make_store: MakeStore) -> None:
    store = make_store(max_queued=1)
    store.submit(new_job())
    before = sorted(store.redis.execute_command("KEYS", "*"))
    refused = new_job("key_b", idempotency_key="k", metadata={"ref": "r"})
    with pytest.raises(QueueFull):
        store.submit(refused)
    assert sorted(store.redis.execute_command("KEYS", "*")) == before
    with pytest.raises(JobNotFound):
        store.get(refused.id)

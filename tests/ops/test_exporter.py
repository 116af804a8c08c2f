"""`reel exporter`: each ended job counted once, by its record; and what waits, is late or was given up."""

import time
from collections.abc import Iterator
from typing import Any

import pytest

from infra.prometheus.exporter import Exporter
from jobs.client import connect
from jobs.job import FailureClass, Job, JobError, Phase, WebhookEvent
from jobs.nodes import GpuUse, NodeInfo, NodeRegistry
from jobs.outbox import Outbox
from jobs.settings import Settings
from jobs.store import JobStore
from tests.support.jobs import new_job, result
from tests.support.redis import RedisServer, redis_server, rewind


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


def test_exporter_counts_each_ended_job_once(redis: RedisServer) -> None:
    settings = Settings(redis_url=redis.url)
    client: Any = connect(settings)
    store, exporter = JobStore(client, settings), Exporter(settings)
    exporter.look()
    gpus = [GpuUse(index=n, busy=0.75, memory_used=60, memory_total=80) for n in range(2)]
    NodeRegistry(client).register(NodeInfo(id="n1", model="tiny", state="busy", gpus=gpus))
    for _ in range(3):
        store.submit(new_job())
    for number in range(3):
        job = store.claim("tiny", "n1")
        assert job is not None
        if number == 0:  # the node dies once; the next claim takes the job over
            rewind(client, job.id, lease=True)
            job = store.claim("tiny", "n1")
            assert job is not None
        if number == 2:
            error = JobError(type="bad", title="t", detail="d", failure_class=FailureClass.USER)
            store.fail(job.id, job.token, error)
        else:
            store.heartbeat(job.id, job.token, phase=Phase.DENOISING, step=1, progress=0.5)
            spent = {"device": "H100", "gpus": 8, "gpu_seconds": 12.0, "cost": 0.25}
            seconds = {"denoising": 1.5, "publishing": 0.4}
            done = result(job.id, job.token).model_copy(update={"seconds": seconds, **spent})
            store.finish(job.id, job.token, done)
        exporter.look()
        exporter.look()
    get = exporter.metrics.registry.get_sample_value
    base = {"model": "tiny", "priority": "normal"}
    assert get("reel_jobs_finished_total", {**base, "state": "succeeded"}) == 2
    assert get("reel_jobs_finished_total", {**base, "state": "failed"}) == 1
    assert get("reel_job_phase_seconds_sum", {"model": "tiny", "phase": "denoising"}) == 3.0
    assert get("reel_attempts_failed_total", {"model": "tiny", "type": "lease-lost"}) == 1
    assert get("reel_attempts_failed_total", {"model": "tiny", "type": "bad"}) == 1  # its last one
    assert get("reel_model_nodes", {"model": "tiny", "state": "busy"}) == 1
    assert get("reel_job_retries_total", {"model": "tiny"}) == 1  # the one whose node died
    assert get("reel_upload_seconds_sum", {"model": "tiny"}) == pytest.approx(0.8)
    assert get("reel_video_bytes_total", {"model": "tiny"}) == 2 * 1234
    assert get("reel_job_gpu_seconds_total", {"model": "tiny", "device": "H100"}) == 24
    assert get("reel_job_cost_total", {"model": "tiny", "device": "H100"}) == 0.5
    gpu = {"model": "tiny", "node": "n1", "gpu": "1"}
    assert get("reel_gpu_busy_ratio", gpu) == 0.75
    assert (get("reel_gpu_memory_bytes", gpu), get("reel_gpu_memory_total_bytes", gpu)) == (60, 80)
    NodeRegistry(client).remove("n1")
    exporter.look()
    assert get("reel_gpu_busy_ratio", gpu) is None  # gone with its node
    assert get("reel_model_nodes", {"model": "tiny", "state": "busy"}) == 0
    assert get("reel_redis_persistence_ok") == 0  # this server has no append-only file
    assert (get("reel_redis_memory_bytes") or 0) > 0
    assert get("reel_redis_memory_limit_bytes") == 0
    for name, value in (("appendonly", "yes"), ("maxmemory", 2**30)):
        client.execute_command("CONFIG", "SET", name, value)
    exporter.look()
    assert (get("reel_redis_persistence_ok"), get("reel_redis_memory_limit_bytes")) == (1, 2**30)


def test_exporter_counts_webhook_posts_by_outcome(redis: RedisServer) -> None:
    settings = Settings(redis_url=redis.url)
    client: Any = connect(settings)
    store, outbox, exporter = JobStore(client, settings), Outbox(client, settings), Exporter(settings)

    def post(outcome: str) -> None:
        store.submit(new_job(callback_url="https://example.com/", webhook_events=(WebhookEvent.STARTED,)))
        store.claim("tiny", "n1")
        delivery = outbox.take(outbox.due()[0], 30)
        assert delivery is not None
        if outcome == "delivered":
            outbox.delivered(delivery.id, 204, attempt=delivery.attempt)
        else:
            outbox.retry(delivery.id, 3600, attempt=delivery.attempt, status=500)

    post("delivered")  # before the exporter began
    exporter.look()
    for outcome in ("delivered", "retry", "delivered"):
        post(outcome)
        exporter.look()
    get = exporter.metrics.registry.get_sample_value
    assert get("reel_webhook_attempts_total", {"outcome": "delivered"}) == 2
    assert get("reel_webhook_attempts_total", {"outcome": "retry"}) == 1


def claimed(store: JobStore) -> Job:
    job = store.claim("tiny", "n1")
    assert job is not None
    return job


def test_seconds_are_those_of_the_record(redis: RedisServer) -> None:
    settings = Settings(redis_url=redis.url)
    client: Any = connect(settings)
    store, exporter = JobStore(client, settings), Exporter(settings)
    NodeRegistry(client).register(NodeInfo(id="n1", model="tiny", state="busy"))
    exporter.look()
    get = exporter.metrics.registry.get_sample_value
    model, priority = {"model": "tiny"}, {"model": "tiny", "priority": "normal"}

    def run() -> Job:
        job = claimed(store)
        seconds = {"denoising": 0.001, "publishing": 9.0}
        done = store.finish(job.id, job.token, result(job.id).model_copy(update={"seconds": seconds}))
        exporter.look()
        return done

    for _ in range(2):
        store.submit(new_job())
    time.sleep(0.01)
    first = run()
    assert first.started_at is not None
    assert first.finished_at is not None
    assert get("reel_job_wait_seconds_sum", priority) == pytest.approx(first.started_at - first.created_at)
    assert get("reel_job_total_seconds_sum", priority) == pytest.approx(first.finished_at - first.created_at)
    assert get("reel_step_seconds_sum", {**model, "size": "64*48"}) == pytest.approx(0.001 / 4)
    assert get("reel_job_node_seconds_total", model) == pytest.approx(0.001), "others run while one publishes"
    assert get("reel_node_idle_gap_seconds_count", model) is None
    second = run()
    assert second.started_at is not None
    gap = second.started_at - first.started_at - 0.001
    assert get("reel_node_idle_gap_seconds_sum", model) == pytest.approx(gap, abs=1e-5)
    store.submit(new_job())
    run()
    assert get("reel_node_idle_gap_seconds_count", model) == 1, "a node that nobody waits for is not idle"


def test_attempts_of_a_replayed_job_count_once(redis: RedisServer) -> None:
    """Its events still tell of its life before the dead letter, which was counted at that end."""
    settings = Settings(redis_url=redis.url)
    store, exporter = JobStore(connect(settings), settings), Exporter(settings)
    exporter.look()
    get = exporter.metrics.registry.get_sample_value
    error = JobError(type="disk", title="t", detail="d", failure_class=FailureClass.INFRASTRUCTURE)

    def fail() -> None:
        job = claimed(store)
        store.fail(job.id, job.token, error)

    job_id = store.submit(new_job())[0].id
    for _ in range(settings.max_attempts):
        fail()
    exporter.look()
    disk = {"model": "tiny", "type": "disk"}
    assert get("reel_attempts_failed_total", disk) == get("reel_dead_letters") * 3 == 3
    store.replay(job_id)
    fail()
    job = claimed(store)
    store.finish(job.id, job.token, result(job.id))
    exporter.look()
    assert get("reel_attempts_failed_total", disk) == 4
    assert get("reel_job_retries_total", {"model": "tiny"}) == 2 + 1
    assert get("reel_dead_letters") == 0


def test_webhooks_that_wait_are_late_or_were_given_up(redis: RedisServer) -> None:
    settings = Settings(redis_url=redis.url)
    client: Any = connect(settings)
    store, outbox, exporter = JobStore(client, settings), Outbox(client, settings), Exporter(settings)
    get = exporter.metrics.registry.get_sample_value
    for _ in range(3):
        store.submit(new_job(callback_url="https://example.com/", webhook_events=(WebhookEvent.STARTED,)))
        claimed(store)
    given_up, next_one, _ = outbox.due()
    delivery = outbox.take(given_up, 30)
    assert delivery is not None
    outbox.dead(delivery.id, attempt=delivery.attempt)
    now = float(client.execute_command("TIME")[0])
    client.execute_command("ZADD", "reel:outbox", "XX", now - 100, next_one)
    exporter.look()
    assert (get("reel_webhooks", {"state": "pending"}), get("reel_webhooks", {"state": "dead"})) == (2, 1)
    assert 100 <= (get("reel_webhook_late_seconds") or 0) < 160
    client.execute_command("DEL", "reel:outbox")
    exporter.look()
    assert get("reel_webhook_late_seconds") == 0

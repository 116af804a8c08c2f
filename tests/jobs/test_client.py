"""When Redis is not there, has forgotten the scripts, or has too few replicas."""

import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import redis as redis_py

from jobs.client import RedisClient, connect, guard
from jobs.endpoints import EndpointStore
from jobs.errors import StoreUnavailable
from jobs.events import read_events
from jobs.job import Job, JobError, JobState, WebhookEvent
from jobs.outbox import Outbox
from jobs.settings import Settings
from jobs.store import JobStore
from tests.support.jobs import new_job, result
from tests.support.redis import open_port, redis_server

ERROR = JobError(type="boom", title="Boom", detail="it broke")
CALLS: dict[str, Callable[[JobStore], object]] = {
    "submit": lambda store: store.submit(new_job()),
    "get": lambda store: store.get("job_x"),
    "list": lambda store: store.list("key_a"),
    "claim": lambda store: store.claim("tiny", "node"),
    "heartbeat": lambda store: store.heartbeat("job_x", 1, phase="denoising", step=1, progress=0.5),
    "finish": lambda store: store.finish("job_x", 1, result()),
    "sweep": lambda store: store.sweep(),
    "stats": lambda store: store.queue_stats(),
    "dead": lambda store: store.dead(),
    "wake": lambda store: store.wait_wake("tiny", 0.1),
    "outbox": lambda store: Outbox(store.redis, store.settings).due(),
    "events": lambda store: read_events(store.redis, "job_x"),
}


@pytest.mark.parametrize("name", CALLS)
def test_an_unreachable_redis_is_one_error(name: str) -> None:
    settings = Settings(redis_url="redis://127.0.0.1:1/0", redis_timeout=0.2)
    store = JobStore(connect(settings), settings)
    with pytest.raises(StoreUnavailable, match="Redis cannot be reached"):
        CALLS[name](store)


def test_a_restart_loses_nothing_and_needs_no_new_client() -> None:
    """Killed with its data in the append-only file; the scripts are gone and are loaded again."""
    with redis_server("--appendonly", "yes", "--appendfsync", "always") as server:
        settings = Settings(redis_url=server.url, redis_timeout=1)
        store = JobStore(connect(settings), settings)
        kept, _ = store.submit(new_job())
        running, _ = store.submit(new_job())
        claimed = store.claim("tiny", "node")
        assert claimed is not None
        server.stop()
        with pytest.raises(StoreUnavailable):
            store.submit(new_job())
        server.start()
        assert store.get(claimed.id) == claimed
        assert store.finish(claimed.id, claimed.token, result()).state == JobState.SUCCEEDED
        again = store.claim("tiny", "node")
        assert again is not None
        assert {claimed.id, again.id} == {kept.id, running.id}
        store.redis.close()


def test_scripts_forgotten_by_redis_are_loaded_again(store: JobStore) -> None:
    store.submit(new_job())
    store.redis.execute_command("SCRIPT FLUSH")
    store.submit(new_job())
    assert sum(row.waiting for row in store.queue_stats()) == 2


def test_a_client_that_returns_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="decode_responses=True"):
        JobStore(redis_py.Redis(), Settings())


def test_a_full_redis_refuses_and_nothing_is_half_written() -> None:
    with redis_server() as server:
        settings = Settings(redis_url=server.url)
        client = connect(settings)
        store = JobStore(client, settings)
        store.submit(new_job())
        used = client.execute_command("INFO", "memory")["used_memory"]
        client.execute_command("CONFIG SET", "maxmemory", used - 1000)
        before = sorted(client.execute_command("KEYS", "*"))
        with pytest.raises(StoreUnavailable, match="refuses writes"):
            store.submit(new_job())
        assert sorted(client.execute_command("KEYS", "*")) == before
        client.close()


def test_a_replica_after_a_failover_is_unavailable_not_wrong() -> None:
    with redis_server() as server:
        settings = Settings(redis_url=server.url, redis_timeout=1)
        client = connect(settings)
        store = JobStore(client, settings)
        store.submit(new_job())
        client.execute_command("REPLICAOF", "127.0.0.1", "1")
        with pytest.raises(StoreUnavailable):
            store.submit(new_job())
        client.close()


def test_waiting_for_replicas() -> None:
    """A submit that too few replicas hold is not accepted; the same call may be made again."""
    with redis_server() as server:
        settings = Settings(redis_url=server.url, redis_wait_replicas=1, redis_wait_ms=100)
        store = JobStore(connect(settings), settings)
        new = new_job()
        with pytest.raises(StoreUnavailable, match="0 of 1 replicas confirmed"):
            store.submit(new)
        with redis_server() as other:
            port = open_port(store.redis)
            replica = redis_py.Redis.from_url(other.url)
            replica.execute_command("REPLICAOF", "127.0.0.1", port)
            end = time.monotonic() + 15
            while True:
                try:
                    job, created = store.submit(new)
                    break
                except StoreUnavailable:
                    assert time.monotonic() < end
            assert created
            assert replica.exists(f"reel:job:{job.id}")
            replica.close()
        store.redis.close()


def test_a_replica_that_only_received_confirms_nothing() -> None:
    """The first replica a server ever has is sent the job, and stays silent about having it."""
    with redis_server("--repl-diskless-sync", "no") as server:
        settings = Settings(redis_url=server.url, redis_wait_replicas=1, redis_wait_ms=3000)
        store = JobStore(connect(settings), settings)
        port = open_port(store.redis)
        with ThreadPoolExecutor() as pool, socket.socket() as replica:
            submitted = pool.submit(store.submit, new_job())
            while not store.redis.execute_command("EXISTS", "reel:fence"):
                time.sleep(0.01)
            replica.connect(("127.0.0.1", port))
            replica.sendall(b"PSYNC ? -1\r\n")
            received = b""
            while b"reel:job:" not in received:
                received += replica.recv(65536)
            with pytest.raises(StoreUnavailable, match="0 of 1 replicas confirmed"):
                submitted.result()
        store.redis.close()


TOLD: dict[str, Callable[[JobStore, Job], object]] = {
    "submit": lambda store, job: store.submit(new_job()),
    "finish": lambda store, job: store.finish(job.id, job.token, result()),
    "fail": lambda store, job: store.fail(job.id, job.token, ERROR),
    "cancel": lambda store, job: store.cancel(job.id),
    "cancel_running": lambda store, job: (
        JobStore(store.redis, Settings()).cancel(job.id),
        store.cancel_running(job.id, job.token),
    ),
    "a webhook's end": lambda store, job: Outbox(store.redis, store.settings).delivered(
        f"msg_{job.id.removeprefix('job_')}_1", 200, attempt=0
    ),
    "an endpoint": lambda store, job: EndpointStore(store.redis, store.settings, "x" * 16).add(
        "key_a", "https://example.com/", ()
    ),
}
UNTOLD: dict[str, Callable[[JobStore, Job], object]] = {
    "claim": lambda store, job: store.claim("tiny", "node"),
    "heartbeat": lambda store, job: store.heartbeat(
        job.id, job.token, phase="denoising", step=1, progress=0.5
    ),
    "give_back": lambda store, job: store.give_back(job.id, job.token),
}


@pytest.mark.parametrize("name", [*TOLD, *UNTOLD])
def test_what_somebody_is_told_of_waits_for_replicas(redis: RedisClient, store: JobStore, name: str) -> None:
    """And nothing else does: a claim or a renewal that is lost is made anew."""
    store.submit(new_job(callback_url="https://example.com/", webhook_events=tuple(WebhookEvent)))
    job = store.claim("tiny", "node")
    assert job is not None
    strict = JobStore(redis, store.settings.model_copy(update={"redis_wait_replicas": 1, "redis_wait_ms": 1}))
    if name in UNTOLD:
        UNTOLD[name](strict, job)
    else:
        with pytest.raises(StoreUnavailable, match="0 of 1 replicas confirmed"):
            TOLD[name](strict, job)


@pytest.mark.parametrize(
    "reply",
    ["MISCONF Redis is configured to save", "NOREPLICAS Not enough good replicas", "BUSY Redis is busy"],
)
def test_not_now_replies_may_be_tried_again(reply: str) -> None:
    with pytest.raises(StoreUnavailable), guard():
        raise redis_py.exceptions.ResponseError(reply)


def test_other_replies_are_bugs_and_pass() -> None:
    with pytest.raises(redis_py.exceptions.ResponseError), guard():
        raise redis_py.exceptions.ResponseError("WRONGTYPE Operation against a key")

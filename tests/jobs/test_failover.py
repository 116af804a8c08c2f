"""Redis dies in the middle of submits: what was accepted is still there, after a restart and on a replica."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import redis as redis_py

from jobs.client import connect
from jobs.errors import LeaseLost, StoreUnavailable
from jobs.settings import Settings
from jobs.store import JobStore
from tests.support.jobs import new_job, result
from tests.support.redis import open_port, redis_server

CLIENTS = 4
KILL_AFTER = 150  # jobs accepted


def accepted_until(settings: Settings, kill: Callable[[], None]) -> list[str]:
    """Ids that several clients were told of, who submit until Redis is killed under them."""
    accepted: list[str] = []

    def client() -> None:
        store = JobStore(connect(settings), settings)
        try:
            while True:
                accepted.append(store.submit(new_job())[0].id)
        except StoreUnavailable:
            return
        finally:
            store.redis.close()

    threads = [threading.Thread(target=client) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + 30
    while len(accepted) < KILL_AFTER and time.monotonic() < end:
        time.sleep(0.002)
    kill()
    for thread in threads:
        thread.join(30)
    assert len(accepted) >= KILL_AFTER
    return accepted


def test_a_killed_redis_has_everything_that_was_accepted() -> None:
    """With `appendfsync everysec`, the default: a reply leaves after the write to the file, not the fsync."""
    with redis_server("--appendonly", "yes", "--appendfsync", "everysec") as server:
        settings = Settings(redis_url=server.url, redis_timeout=2)
        accepted = accepted_until(settings, server.stop)
        server.start()
        store = JobStore(connect(settings), settings)
        assert [one for one in accepted if store.get(one).state != "queued"] == []
        store.redis.close()


def test_a_failover_has_everything_that_was_accepted(tmp_path: Path) -> None:
    """With `redis_wait_replicas`; the same client goes on, as the address now leads to the replica."""
    address = tmp_path / "current.sock"
    with redis_server() as primary, redis_server() as replica:
        address.symlink_to(primary.socket)
        settings = Settings(
            redis_url=f"unix://{address}", redis_timeout=2, redis_wait_replicas=1, redis_wait_ms=2000
        )
        store = JobStore(connect(settings), settings)
        promoted = redis_py.Redis.from_url(replica.url)
        promoted.execute_command("REPLICAOF", "127.0.0.1", open_port(store.redis))
        end = time.monotonic() + 15
        while promoted.info("replication").get("master_link_status") != "up":
            assert time.monotonic() < end
            time.sleep(0.05)
        running, _ = store.submit(new_job())
        claimed = store.claim("tiny", "node")
        assert claimed is not None

        accepted = accepted_until(settings, primary.stop)
        address.unlink()
        address.symlink_to(replica.socket)
        promoted.execute_command("REPLICAOF", "NO", "ONE")
        # A node finishes what it claimed before. The new primary has no replica yet, so nobody waits for one.
        plain = JobStore(store.redis, settings.model_copy(update={"redis_wait_replicas": 0}))
        assert plain.finish(running.id, claimed.token, result(running.id, claimed.token)).terminal
        assert [one for one in accepted if plain.get(one).state != "queued"] == []
        promoted.close()
        store.redis.close()


def test_an_owner_whose_claim_was_lost_with_the_primary_loses() -> None:
    """The claim never reached the replica, where the job is claimed anew: only the later owner may write."""
    with redis_server() as primary, redis_server() as replica:
        old, new = (
            JobStore(connect(settings), settings)
            for settings in (Settings(redis_url=server.url) for server in (primary, replica))
        )
        new.redis.execute_command("REPLICAOF", "127.0.0.1", open_port(old.redis))
        job, _ = old.submit(new_job())
        end = time.monotonic() + 15
        while not new.redis.execute_command("EXISTS", f"reel:job:{job.id}"):
            assert time.monotonic() < end
            time.sleep(0.05)
        new.redis.execute_command("REPLICAOF", "NO", "ONE")
        stale, current = old.claim("tiny", "node-a"), new.claim("tiny", "node-b")
        assert stale is not None
        assert current is not None
        with pytest.raises(LeaseLost):
            new.heartbeat(job.id, stale.token, phase="denoising", step=1, progress=0.5)
        with pytest.raises(LeaseLost):
            new.finish(job.id, stale.token, result(job.id, stale.token))
        new.finish(job.id, current.token, result(job.id, current.token))
        old.redis.close()
        new.redis.close()

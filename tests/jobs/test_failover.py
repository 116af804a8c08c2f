"""Redis dies in the middle of submits: what was accepted is still there, after a restart and on a replica."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis as redis_py
from redis.connection import UnixDomainSocketConnection

from jobs.client import connect
from jobs.errors import LeaseLost, StoreUnavailable
from jobs.settings import Settings
from jobs.store import JobStore
from tests.support.jobs import new_job, result
from tests.support.redis import RedisServer, open_port, redis_server

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


def follow(replica: RedisServer, port: int) -> int:
    """Have `replica` copy the server at `port`; the port where it can be copied itself."""
    with redis_py.Redis.from_url(replica.url) as client:
        client.execute_command("REPLICAOF", "127.0.0.1", port)
        end = time.monotonic() + 15
        while client.info("replication").get("master_link_status") != "up":
            assert time.monotonic() < end
            time.sleep(0.02)
        return open_port(client)


def test_a_submit_that_is_sent_again_to_the_new_primary_is_stored_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old primary ran the script alone and died before it was asked how many have it: the client's own
    retry reaches the new one, whose replica must not vouch for what neither of them ever saw.
    """
    address = tmp_path / "current.sock"
    with redis_server() as old, redis_server() as new, redis_server() as third:
        address.symlink_to(old.socket)
        settings = Settings(
            redis_url=f"unix://{address}", redis_timeout=2, redis_wait_replicas=1, redis_wait_ms=1500
        )
        store = JobStore(connect(settings), settings)
        follow(third, follow(new, open_port(store.redis)))
        until_accepted(store)  # now the scripts are loaded
        with redis_py.Redis.from_url(new.url) as promoted:
            promoted.execute_command("REPLICAOF", "NO", "ONE")
            read = UnixDomainSocketConnection.read_response

            def read_and_fail_over(self: UnixDomainSocketConnection, *args: Any, **options: Any) -> Any:
                monkeypatch.undo()
                reply = read(self, *args, **options)
                old.stop()
                address.unlink()
                address.symlink_to(new.socket)
                return reply

            monkeypatch.setattr(UnixDomainSocketConnection, "read_response", read_and_fail_over)
            job, _ = store.submit(new_job())
            assert promoted.exists(f"reel:job:{job.id}")
        store.redis.close()


def test_a_repeat_on_a_new_connection_waits_for_the_replicas_as_well() -> None:
    """It writes nothing, and newer Redis lets a connection that wrote nothing wait for nothing."""
    with redis_server() as primary, redis_server() as replica:
        settings = Settings(redis_url=primary.url, redis_wait_replicas=1, redis_wait_ms=100)
        one, other = (JobStore(connect(settings), settings) for _ in range(2))
        follow(replica, open_port(one.redis))
        for store in (one, other):  # now the scripts are loaded
            until_accepted(store)
        replica.pause(3)
        new = new_job()
        for store in (one, other, one):
            with pytest.raises(StoreUnavailable, match="0 of 1 replicas"):
                store.submit(new)
        for store in (one, other):
            store.redis.close()


def until_accepted(store: JobStore) -> None:
    """Submit a job, as often as a replica that has just connected needs to say so."""
    new, end = new_job(), time.monotonic() + 15
    while True:
        try:
            store.submit(new)
            return
        except StoreUnavailable:
            assert time.monotonic() < end

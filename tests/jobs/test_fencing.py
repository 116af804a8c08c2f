"""A stale owner loses, whatever it tries; a script that is sent twice does its work once."""

import time
from collections.abc import Callable

import pytest

from jobs.errors import LeaseLost
from jobs.job import Job, JobError, JobState
from jobs.store import JobStore
from tests.jobs.conftest import MakeStore
from tests.support.jobs import new_job, result
from tests.support.redis import rewind

ERROR = JobError(type="boom", title="Boom", detail="it broke")
NODE_SIDE: dict[str, Callable[[JobStore, str, int], object]] = {
    "heartbeat": lambda store, job, token: store.heartbeat(
        job, token, phase="denoising", step=1, progress=0.5
    ),
    "finish": lambda store, job, token: store.finish(job, token, result(job, token)),
    "fail": lambda store, job, token: store.fail(job, token, ERROR),
    "give_back": lambda store, job, token: store.give_back(job, token),
    "cancel_running": lambda store, job, token: store.cancel_running(job, token),
}
ENDING = [name for name in NODE_SIDE if name != "heartbeat"]


def claimed(store: JobStore, node: str = "node") -> Job:
    job = store.claim("tiny", node)
    assert job is not None
    return job


@pytest.mark.parametrize("name", NODE_SIDE)
def test_a_paused_node_that_comes_back_loses(make_store: MakeStore, name: str) -> None:
    store = make_store(lease_seconds=0.05)
    store.submit(new_job())
    old = claimed(store, "paused")
    time.sleep(0.06)
    new = claimed(make_store(), "fresh")
    assert (new.id, new.attempts, new.owner) == (old.id, 1, "fresh")
    assert new.token > old.token
    before = store.get(new.id)
    with pytest.raises(LeaseLost, match=f"token {old.token} no longer owns.*at token {new.token}"):
        NODE_SIDE[name](store, old.id, old.token)
    assert store.get(new.id) == before
    assert store.finish(new.id, new.token, result(new.id, new.token)).state == JobState.SUCCEEDED


@pytest.mark.parametrize("name", NODE_SIDE)
@pytest.mark.parametrize("ahead", [-1, 1])
def test_a_wrong_token_is_refused(store: JobStore, name: str, ahead: int) -> None:
    store.submit(new_job())
    job = claimed(store)
    with pytest.raises(LeaseLost):
        NODE_SIDE[name](store, job.id, job.token + ahead)
    assert store.get(job.id) == job


@pytest.mark.parametrize("name", NODE_SIDE)
def test_an_unclaimed_or_vanished_job_belongs_to_nobody(store: JobStore, name: str) -> None:
    job, _ = store.submit(new_job())
    for token in (0, 1):
        with pytest.raises(LeaseLost, match=r"is queued|at token 0"):
            NODE_SIDE[name](store, job.id, token)
    with pytest.raises(LeaseLost, match="the job is gone"):
        NODE_SIDE[name](store, "job_nowhere", 1)


@pytest.mark.parametrize("first", ENDING)
@pytest.mark.parametrize("then", NODE_SIDE)
def test_an_attempt_ends_once(store: JobStore, first: str, then: str) -> None:
    """The same call again is answered as before and changes nothing; any other is refused."""
    store.submit(new_job())
    job = claimed(store)
    if first == "cancel_running":
        store.cancel(job.id)
    NODE_SIDE[first](store, job.id, job.token)
    ended = store.get(job.id)
    if then == first:
        assert NODE_SIDE[then](store, job.id, job.token) == ended
    else:
        with pytest.raises(LeaseLost):
            NODE_SIDE[then](store, job.id, job.token)
    assert store.get(job.id) == ended


def test_the_committed_result_is_the_first_one(store: JobStore) -> None:
    store.submit(new_job())
    job = claimed(store)
    kept = store.finish(job.id, job.token, result(job.id, job.token))
    again = store.finish(job.id, job.token, result("job_other", 9))
    assert again.result == kept.result == result(job.id, job.token)


def test_a_claim_whose_reply_was_lost_finds_its_job_again(store: JobStore) -> None:
    store.submit(new_job())
    store.submit(new_job())
    first = store.scripts.run("claim", "tiny", "node", 1, "nonce")
    again = store.scripts.run("claim", "tiny", "node", 1, "nonce")
    assert first == again
    assert store.scripts.run("claim", "tiny", "node", 1, "other")[1] != first[1]


def test_a_live_lease_is_not_taken_over(make_store: MakeStore) -> None:
    store = make_store(lease_seconds=0.5)
    store.submit(new_job())
    job = claimed(store)
    for step in range(5):
        time.sleep(0.15)
        assert store.claim("tiny", "thief") is None
        assert store.sweep().total == 0
        store.heartbeat(job.id, job.token, phase="denoising", step=step, progress=step / 5)
    assert store.get(job.id).owner == "node"


def test_a_newer_jobs_lost_lease_is_left_to_newer_nodes(store: JobStore) -> None:
    """An older node could not run it, and each try would cost an attempt; what it can run it takes over."""
    jobs = []
    for schema in ("2", "1"):
        store.submit(new_job())
        jobs.append(claimed(store, "dead"))
        store.redis.execute_command("HSET", f"reel:job:{jobs[-1].id}", "schema", schema)
    for job in jobs:
        rewind(store.redis, job.id, lease=True)
    newer, plain = jobs
    taken = store.claim("tiny", "old", schema=1)
    assert taken is not None
    assert (taken.id, taken.attempts) == (plain.id, 1)
    assert store.claim("tiny", "old", schema=1) is None
    assert (store.get(newer.id).state, store.get(newer.id).attempts) == (JobState.RUNNING, 0)
    taken = store.claim("tiny", "new", schema=2)
    assert taken is not None
    assert taken.id == newer.id


def test_a_lease_that_was_renewed_since_a_sweep_looked_is_kept(store: JobStore) -> None:
    store.submit(new_job())
    job = claimed(store)
    assert store.scripts.run("lose", job.id, "tiny") == ["none"]
    assert store.get(job.id) == job


def test_a_renewal_is_in_the_record_and_in_the_list_of_leases(store: JobStore) -> None:
    store.submit(new_job())
    job = claimed(store)
    rewind(store.redis, job.id, lease=True)
    store.heartbeat(job.id, job.token, phase="denoising", step=1, progress=0.1)
    now = store.get(job.id)
    assert now.lease_until is not None
    assert job.lease_until is not None
    assert now.lease_until > job.lease_until
    assert float(store.redis.execute_command("ZSCORE", "reel:leases:tiny", job.id)) == now.lease_until


def test_an_expired_lease_that_nobody_took_can_still_be_renewed(make_store: MakeStore) -> None:
    store = make_store(lease_seconds=0.02)
    store.submit(new_job())
    job = claimed(store)
    time.sleep(0.03)
    store.heartbeat(job.id, job.token, phase="denoising", step=1, progress=0.1)
    assert store.get(job.id).token == job.token

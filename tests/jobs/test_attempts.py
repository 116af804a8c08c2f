"""Retries by failure class, dead letter, replay, giving back, cancel, deadline, retention."""

import time

import pytest

from jobs.errors import IllegalTransition, JobNotFound
from jobs.job import FailureClass, Job, JobError, JobState
from jobs.store import DETAIL_LIMIT, JobStore
from jobs.sweep import SweepReport
from tests.jobs.conftest import MakeStore
from tests.support.jobs import new_job, result
from tests.support.redis import rewind

F = FailureClass


def error(kind: FailureClass, detail: str = "it broke") -> JobError:
    return JobError(type="boom", title="Boom", detail=detail, failure_class=kind)


def claimed(store: JobStore, node: str = "node") -> Job:
    job = store.claim("tiny", node)
    assert job is not None
    return job


@pytest.mark.parametrize(
    ("kind", "starts"), [(F.USER, 1), (F.OUT_OF_MEMORY, 2), (F.INFRASTRUCTURE, 3), (F.LOST, 3)]
)
def test_tries_by_failure_class(store: JobStore, kind: FailureClass, starts: int) -> None:
    new = new_job()
    store.submit(new)
    for attempt in range(1, starts + 1):
        job = claimed(store)
        after = store.fail(job.id, job.token, error(kind))
        assert after.attempts == attempt
        assert after.state == (JobState.FAILED if attempt == starts else JobState.QUEUED)
    assert store.claim("tiny", "node") is None
    failed = store.get(new.id)
    assert failed.error == error(kind)
    assert failed.finished_at is not None
    dead, _ = store.dead()
    assert [job.id for job in dead] == ([] if kind == F.USER else [new.id])


def test_out_of_memory_counts_apart_from_other_failures(store: JobStore) -> None:
    store.submit(new_job())
    states = []
    for kind in (F.OUT_OF_MEMORY, F.INFRASTRUCTURE, F.OUT_OF_MEMORY):
        job = claimed(store)
        states.append(store.fail(job.id, job.token, error(kind)).state)
    assert states == [JobState.QUEUED, JobState.QUEUED, JobState.FAILED]


@pytest.mark.parametrize("by", ["claim", "sweep"])
def test_a_poison_job_that_kills_every_node_ends_in_the_dead_letter(make_store: MakeStore, by: str) -> None:
    store = make_store(lease_seconds=0.03, max_attempts=3)
    new = new_job()
    store.submit(new)
    tokens = [0]
    for death in range(1, 4):
        tokens.append(claimed(store, f"node-{death}").token)
        assert tokens[-1] > tokens[-2]
        time.sleep(0.04)
        if by == "sweep":
            report = store.sweep()
            assert (report.requeued, report.failed) == (([new.id], []) if death < 3 else ([], [new.id]))
    assert store.claim("tiny", "node-4") is None
    job = store.get(new.id)
    assert (job.state, job.attempts) == (JobState.FAILED, 3)
    assert job.error is not None
    assert job.error.failure_class == F.LOST
    assert "node-3" in job.error.detail


def test_two_sweeps_charge_one_lost_lease_once(store: JobStore) -> None:
    store.submit(new_job())
    job = claimed(store)
    rewind(store.redis, job.id, lease=True)
    assert store.sweep().requeued == [job.id]
    assert store.sweep().total == 0
    assert store.get(job.id).attempts == 1


def test_replay_starts_afresh_and_the_token_goes_on_rising(make_store: MakeStore) -> None:
    store = make_store(max_attempts=1)
    new = new_job()
    store.submit(new)
    job = claimed(store)
    store.fail(job.id, job.token, error(F.INFRASTRUCTURE))
    again = store.replay(new.id)
    assert (again.state, again.attempts, again.error, again.finished_at) == (JobState.QUEUED, 0, None, None)
    assert store.dead() == ([], None)
    before, job = job.token, claimed(store)
    assert job.token > before
    assert store.finish(job.id, job.token, result()).state == JobState.SUCCEEDED
    with pytest.raises(IllegalTransition):
        store.replay(new.id)
    with pytest.raises(JobNotFound):
        store.replay("job_nowhere")


def test_a_replayed_job_has_all_its_tries_again_and_no_old_end(store: JobStore) -> None:
    """Neither the deadline before its first start nor the retention after its end count any more."""
    new, behind = new_job(deadline_seconds=1000), new_job()
    for one in (new, behind):
        store.submit(one)
    store.reject(new.id, error(F.INFRASTRUCTURE))
    again = store.replay(new.id)
    assert (again.state, again.deadline_at) == (JobState.QUEUED, None)
    assert [store.position(one.id) for one in (behind, new)] == [0, 1], "it goes to the back of its lane"
    store.cancel(behind.id)
    rewind(store.redis, new.id, deadline=True)
    store.redis.execute_command("ZADD", "reel:retention", "XX", 1, new.id)
    assert store.sweep().purged == []
    for state in (JobState.QUEUED, JobState.FAILED):
        job = claimed(store)
        assert store.fail(job.id, job.token, error(F.OUT_OF_MEMORY)).state == state
    store.replay(new.id)
    job = claimed(store)
    assert store.fail(job.id, job.token, error(F.OUT_OF_MEMORY)).state == JobState.QUEUED


def test_a_users_error_is_not_replayed(store: JobStore) -> None:
    store.submit(new_job())
    job = claimed(store)
    store.fail(job.id, job.token, error(F.USER))
    with pytest.raises(IllegalTransition):
        store.replay(job.id)


def test_dead_letter_pages(make_store: MakeStore) -> None:
    store = make_store(max_attempts=1)
    failed = []
    for _ in range(5):
        store.submit(new_job())
        job = claimed(store)
        store.fail(job.id, job.token, error(F.INFRASTRUCTURE))
        failed.append(job.id)
        time.sleep(0.002)  # ordered by the millisecond of the failure
    first, cursor = store.dead(limit=3)
    rest, end = store.dead(cursor=cursor, limit=3)
    assert end is None
    assert [job.id for job in first + rest] == failed[::-1]


def test_giving_back_keeps_attempts_and_place(store: JobStore) -> None:
    first, second = new_job(), new_job()
    store.submit(first)
    store.submit(second)
    before = 0
    for _ in range(5):  # more often than max_attempts
        job = claimed(store)
        assert (job.id, job.attempts) == (first.id, 0)
        assert job.token > before
        before = job.token
        back = store.give_back(job.id, job.token)
        assert (back.state, back.owner, back.lease_until) == (JobState.QUEUED, None, None)
        assert store.position(first.id) == 0


def test_cancel_of_a_waiting_job_is_immediate(store: JobStore) -> None:
    new = new_job()
    store.submit(new)
    job = store.cancel(new.id)
    assert job.state == JobState.CANCELED
    assert job.finished_at is not None
    assert store.claim("tiny", "node") is None
    assert all(row.waiting == 0 for row in store.queue_stats())


def test_cancel_of_a_running_job_reaches_its_owner(store: JobStore) -> None:
    store.submit(new_job())
    job = claimed(store)
    assert not store.heartbeat(job.id, job.token, phase="encoding", step=0, progress=0)
    asked = store.cancel(job.id)
    assert (asked.state, asked.cancel_requested) == (JobState.RUNNING, True)
    assert store.cancel(job.id) == asked  # asking twice is the same as once
    assert store.heartbeat(job.id, job.token, phase="encoding", step=0, progress=0)
    assert store.cancel_running(job.id, job.token).state == JobState.CANCELED


def test_a_cancel_that_comes_too_late_loses(store: JobStore) -> None:
    store.submit(new_job())
    job = claimed(store)
    store.cancel(job.id)
    assert store.finish(job.id, job.token, result()).state == JobState.SUCCEEDED


@pytest.mark.parametrize("end", ["fail", "give_back", "lost", "swept"])
def test_a_canceled_attempt_is_not_tried_again(store: JobStore, end: str) -> None:
    store.submit(new_job())
    job = claimed(store)
    store.cancel(job.id)
    if end == "fail":
        store.fail(job.id, job.token, error(F.INFRASTRUCTURE))
    elif end == "give_back":
        store.give_back(job.id, job.token)
    else:
        rewind(store.redis, job.id, lease=True)
        if end == "swept":
            assert store.sweep() == SweepReport(canceled=[job.id])
        assert store.claim("tiny", "other") is None
    assert store.get(job.id).state == JobState.CANCELED
    assert store.dead() == ([], None)


@pytest.mark.parametrize("by", ["claim", "sweep"])
def test_a_deadline_before_the_start_expires_the_job(store: JobStore, by: str) -> None:
    new, other = new_job(deadline_seconds=0.05), new_job(deadline_seconds=100)
    store.submit(new)
    store.submit(other)
    assert store.scripts.run("expire", other.id) == ["none"], "not late: a sweep read an old list"
    time.sleep(0.06)
    if by == "claim":
        assert claimed(store).id == other.id
    else:
        assert store.sweep().expired == [new.id]
    assert store.get(new.id).state == JobState.EXPIRED


def test_a_job_that_started_in_time_never_expires(store: JobStore) -> None:
    store.submit(new_job(deadline_seconds=0.5))
    job = claimed(store)
    time.sleep(0.55)
    assert store.sweep().total == 0
    store.give_back(job.id, job.token)
    assert store.sweep().total == 0
    assert claimed(store).id == job.id


def test_retention_removes_every_trace_and_names_the_files(store: JobStore) -> None:
    new = new_job(metadata={"ref": "r"}, deadline_seconds=100)
    store.submit(new)
    job = claimed(store)
    store.finish(job.id, job.token, result())
    assert store.sweep().purged == []
    rewind(store.redis, new.id, retention=True)
    assert store.sweep().purged == [new.id]
    with pytest.raises(JobNotFound):
        store.get(new.id)
    assert store.garbage() == [new.id]
    store.garbage_done(new.id)
    left = set(store.redis.execute_command("KEYS", "*"))
    held = {key for key in left if key.startswith("reel:claim:")}  # ends with its lease
    assert left - held == {"reel:queues", "reel:waiting:tiny", "reel:running:tiny", "reel:wake:tiny"}


def test_retention_waits_for_webhooks(store: JobStore) -> None:
    new = new_job(callback_url="https://example.com/hook")
    store.submit(new)
    store.cancel(new.id)
    rewind(store.redis, new.id, retention=True)
    assert store.sweep().purged == []
    assert store.get(new.id).state == JobState.CANCELED


def test_only_an_ended_job_can_be_deleted(store: JobStore) -> None:
    new = new_job()
    store.submit(new)
    with pytest.raises(IllegalTransition, match="queued"):
        store.delete(new.id)
    job = claimed(store)
    with pytest.raises(IllegalTransition, match="running"):
        store.delete(new.id)
    store.finish(new.id, job.token, result())
    assert store.delete(new.id).id == new.id
    with pytest.raises(JobNotFound):
        store.delete(new.id)
    assert store.garbage() == [new.id]


def test_a_long_error_is_cut(store: JobStore) -> None:
    store.submit(new_job())
    job = claimed(store)
    failed = store.fail(job.id, job.token, error(F.USER, "x" * 50_000))
    assert failed.error is not None
    assert len(failed.error.detail) == DETAIL_LIMIT


def test_the_version_rises_with_every_visible_change_and_only_then(store: JobStore) -> None:
    job, _ = store.submit(new_job())
    versions = [job.version]
    claim = claimed(store)
    versions.append(claim.version)
    for step in (1, 2):
        store.heartbeat(job.id, claim.token, phase="denoising", step=step, progress=step / 4, eta_seconds=2.5)
        versions.append(store.get(job.id).version)
    store.heartbeat(job.id, claim.token, phase="denoising", step=2, progress=0.5, eta_seconds=2.4)
    assert store.get(job.id).version == versions[-1]
    versions.append(store.cancel(job.id).version)
    versions.append(store.finish(job.id, claim.token, result()).version)
    assert versions == sorted(set(versions))

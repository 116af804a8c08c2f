"""The table of job.py is what the Lua enforces, and what the operations do."""

import contextlib
import json
from collections.abc import Callable

import pytest
from redis.exceptions import ResponseError

from jobs.client import RedisClient
from jobs.errors import IllegalTransition, LeaseLost
from jobs.job import TRANSITIONS, FailureClass, Job, JobError, JobState
from jobs.scripts import source
from jobs.store import JobStore
from tests.support.jobs import new_job, result
from tests.support.redis import rewind

S = JobState
BROKEN = JobError(type="boom", title="Boom", detail="it broke")
USERS = BROKEN.model_copy(update={"failure_class": FailureClass.USER})


def in_state(store: JobStore, state: JobState) -> Job:
    """A job brought to `state` by operations alone; a failed one is in the dead letter."""
    new = new_job(deadline_seconds=1000)
    store.submit(new)
    if state in (S.RUNNING, S.SUCCEEDED):
        job = store.claim("tiny", "node")
        assert job is not None
        assert job.id == new.id
        if state == S.SUCCEEDED:
            store.finish(job.id, job.token, result())
    elif state == S.FAILED:
        store.reject(new.id, BROKEN)
    elif state == S.CANCELED:
        store.cancel(new.id)
    elif state == S.EXPIRED:
        rewind(store.redis, new.id, deadline=True)
        store.sweep()
    assert store.get(new.id).state == state
    return store.get(new.id)


def cancel_and_confirm(store: JobStore, job: Job) -> None:
    store.cancel(job.id)
    store.cancel_running(job.id, job.token)


def lose_lease(store: JobStore, job: Job) -> None:
    rewind(store.redis, job.id, lease=True)
    store.sweep()


def pass_deadline(store: JobStore, job: Job) -> None:
    rewind(store.redis, job.id, deadline=True)
    store.sweep()


# Every operation that can change a state; each is tried on a job in every state.
OPERATIONS: dict[str, Callable[[JobStore, Job], object]] = {
    "claim": lambda store, job: store.claim("tiny", "node"),
    "heartbeat": lambda store, job: store.heartbeat(
        job.id, job.token, phase="denoising", step=1, progress=0.5
    ),
    "finish": lambda store, job: store.finish(job.id, job.token, result()),
    "fail": lambda store, job: store.fail(job.id, job.token, BROKEN),
    "fail, user's fault": lambda store, job: store.fail(job.id, job.token, USERS),
    "give back": lambda store, job: store.give_back(job.id, job.token),
    "cancel": lambda store, job: store.cancel(job.id),
    "cancel and confirm": cancel_and_confirm,
    "reject": lambda store, job: store.reject(job.id, BROKEN),
    "replay": lambda store, job: store.replay(job.id),
    "lose the lease": lose_lease,
    "pass the deadline": pass_deadline,
}


def lua(redis: RedisClient, code: str, *args: str) -> str:
    """Run `code` after the scripts' prelude."""
    prelude = source("rise").rsplit("-- rise(model)", 1)[0]
    conf = json.dumps({"retention_seconds": 1, "events_cap": 10})
    return str(redis.execute_command("EVAL", prelude + code, 0, conf, *args))


def test_lua_has_the_same_table(redis: RedisClient) -> None:
    table = json.loads(lua(redis, "return cjson.encode(LEGAL)"))
    assert {S(state): frozenset(map(S, to)) for state, to in table.items()} == TRANSITIONS


@pytest.mark.parametrize("before", S)
@pytest.mark.parametrize("after", S)
def test_lua_allows_exactly_the_table(store: JobStore, before: JobState, after: JobState) -> None:
    job = in_state(store, before)
    move = "move(load(ARGV[2]), ARGV[3], {}) return 'moved'"
    if after in TRANSITIONS[before]:
        assert lua(store.redis, move, job.id, after.value) == "moved"
        assert store.get(job.id).state == after
    else:
        with pytest.raises(ResponseError, match="illegal transition"):
            lua(store.redis, move, job.id, after.value)
        assert store.get(job.id) == job


def test_operations_make_every_legal_move_and_no_other(store: JobStore) -> None:
    seen: dict[JobState, set[JobState]] = {state: set() for state in S}
    for before in S:
        for name, operation in OPERATIONS.items():
            store.redis.execute_command("FLUSHDB")
            job = in_state(store, before)
            with contextlib.suppress(IllegalTransition, LeaseLost):
                operation(store, job)
            after = store.get(job.id)
            if after.state != before:
                seen[before].add(after.state)
                assert after.version > job.version
            if job.terminal and after.state == before:
                assert after == job, f"{name} changed a job that is {before}"
    assert {state: frozenset(after) for state, after in seen.items()} == TRANSITIONS


def test_a_terminal_job_says_why_it_cannot_be_canceled(store: JobStore) -> None:
    job = in_state(store, S.SUCCEEDED)
    with pytest.raises(IllegalTransition, match="is succeeded: it cannot become canceled"):
        store.cancel(job.id)


def test_an_unconfirmed_cancel_request_is_needed_to_confirm(store: JobStore) -> None:
    job = in_state(store, S.RUNNING)
    with pytest.raises(IllegalTransition, match="without a request to cancel"):
        store.cancel_running(job.id, job.token)

"""A command whose reply was lost is sent again: what a client or an operator asked for happens once, and is
answered as if nothing had been lost.
"""

import json
from collections.abc import Callable
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisGone

from jobs.errors import IllegalTransition, JobNotFound, StoreUnavailable
from jobs.job import FailureClass, Job, JobError
from jobs.outbox import Outbox
from jobs.store import JobStore
from tests.support.jobs import new_job

BROKEN = JobError(type="x", title="x", detail="x", failure_class=FailureClass.INFRASTRUCTURE)


def waiting(store: JobStore) -> Job:
    return store.submit(new_job(callback_url="https://a.example/"))[0]


def running(store: JobStore) -> Job:
    waiting(store)
    job = store.claim("tiny", "node")
    assert job is not None
    return job


def ended(store: JobStore) -> Job:
    return store.cancel(waiting(store).id)


def dead(store: JobStore) -> Job:
    return store.reject(waiting(store).id, BROKEN)


OPERATIONS: dict[str, tuple[Callable[[JobStore], Job], Callable[[JobStore, str], Job], str]] = {
    "cancel a waiting job": (waiting, lambda store, job: store.cancel(job), "canceled"),
    "cancel a running job": (running, lambda store, job: store.cancel(job), "running"),
    "reject": (waiting, lambda store, job: store.reject(job, BROKEN), "failed"),
    "replay": (dead, lambda store, job: store.replay(job), "queued"),
    "delete": (ended, lambda store, job: store.delete(job), "canceled"),
}


def lose_next_reply(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Cut the connection after the next script's reply has come; what was cut is in the list."""
    connection: Any = store.redis
    kind = connection.connection_pool.connection_class
    read, lost = kind.read_response, []

    def read_and_lose(self: Any, *args: Any, **options: Any) -> Any:
        reply = read(self, *args, **options)
        if isinstance(reply, list) and not lost:
            lost.append(str(reply[0]))
            self.disconnect()
            raise RedisGone("the reply was lost")
        return reply

    monkeypatch.setattr(kind, "read_response", read_and_lose)
    return lost


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_lost_reply_changes_nothing(store: JobStore, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    begin, operate, state = OPERATIONS[name]
    job = begin(store)
    lost = lose_next_reply(store, monkeypatch)
    answer = operate(store, job.id)
    assert lost == ["ok"]
    assert (answer.id, answer.state) == (job.id, state)
    monkeypatch.undo()
    if name == "delete":
        with pytest.raises(JobNotFound):
            store.get(job.id)
    else:
        assert store.get(job.id) == answer  # the version too: it happened once


def test_a_claim_after_one_that_was_not_answered_finds_its_job(
    store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long Redis was away: the job would have to wait for its lease's end, and lose a try."""
    for _ in range(2):
        waiting(store)
    real, taken = store.scripts.run, list[str]()

    def unheard(name: str, *args: Any, **options: Any) -> Any:
        reply = real(name, *args, **options)
        taken.append(json.loads(reply[1])["id"])
        raise StoreUnavailable("the reply was lost")

    with monkeypatch.context() as patch:
        patch.setattr(store.scripts, "run", unheard)
        with pytest.raises(StoreUnavailable):
            store.claim("tiny", "node")
    claims = [store.claim("tiny", "node") for _ in range(3)]
    ids = [job.id if job else None for job in claims]
    assert ids[0] == taken[0]
    assert ids[1] not in (None, ids[0])
    assert ids[2] is None


def test_a_test_event_that_is_sent_again_is_one(store: JobStore, outbox: Outbox) -> None:
    args = ("msg_0_1", "key_a", "we_0", "https://a.example/", "{}")
    assert store.scripts.run("outbox_ping", *args) == store.scripts.run("outbox_ping", *args)
    assert len(outbox.for_endpoint("we_0")) == outbox.pending() == 1


def test_an_endpoints_record_that_is_sent_again_is_one(store: JobStore) -> None:
    """A "no" to the repeat of the last one that fits would take its secret away."""
    run = store.scripts.run
    assert [run("endpoint_add", "key_a", "we_0", "old", 1) for _ in range(2)] == [1, 1]
    assert run("endpoint_add", "key_a", "we_1", "another", 1) == 0
    assert [run("endpoint_change", "key_a", "we_0", "old", "new") for _ in range(2)] == ["done", "done"]
    assert run("endpoint_change", "key_a", "we_0", "old", "newer") == "differs"
    assert run("endpoint_change", "key_a", "we_1", "old", "new") == "gone"
    assert store.redis.execute_command("HGETALL", "reel:endpoints:key_a") == {"we_0": "new"}


def test_asking_anew_is_no_repeat(store: JobStore) -> None:
    job = ended(store)
    with pytest.raises(IllegalTransition):
        store.cancel(job.id)
    store.delete(job.id)
    with pytest.raises(JobNotFound):
        store.delete(job.id)


def test_what_is_remembered_of_an_operation_goes_by_itself(store: JobStore) -> None:
    ended(store)
    (key,) = store.redis.execute_command("KEYS", "reel:operation:*")
    assert 0 < store.redis.execute_command("TTL", key) <= 60

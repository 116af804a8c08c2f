"""A lease and the last word on a job while Redis is away, and how long a draining node goes on."""

import time
from types import SimpleNamespace
from typing import Any

import pytest

from jobs.errors import IllegalTransition, JobNotFound, LeaseLost, StoreUnavailable
from jobs.job import Phase
from tests.support.node import until
from worker import lease
from worker.drain import Drain
from worker.lease import Lease, tell


class Redis:
    """Away for so many calls, or with so many words against them."""

    def __init__(self, *errors: Exception) -> None:
        self.errors, self.calls = list(errors), 0

    def call(self) -> str:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return "told"


@pytest.fixture
def _no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=lambda seconds: None)
    monkeypatch.setattr(lease, "time", clock)


@pytest.mark.usefixtures("_no_waits")
def test_a_redis_that_comes_back_is_told() -> None:
    redis = Redis(*[StoreUnavailable("away")] * 3)
    assert tell(redis.call, 60.0) == "told"
    assert redis.calls == 4


def test_a_redis_that_stays_away_is_left_to_the_leases_end() -> None:
    redis = Redis(*[StoreUnavailable("away")] * 1000)
    assert tell(redis.call, -1.0) is None
    assert redis.calls == 1


@pytest.mark.parametrize(
    "error",
    [LeaseLost("job_1", 1, "gone"), IllegalTransition("job_1", "succeeded", "x"), JobNotFound("job_1")],
)
def test_a_job_that_is_no_longer_ours_is_let_go(error: Exception) -> None:
    redis = Redis(error)
    assert tell(redis.call) is None
    assert redis.calls == 1


class Store:
    """Answers heartbeats with what it was given, one after the other; the last one for ever after."""

    def __init__(self, *answers: bool | Exception) -> None:
        self.answers, self.beats = list(answers), 0

    def heartbeat(self, *_: object, **__: object) -> bool:
        self.beats += 1
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.mark.parametrize(
    ("last", "flags"),
    [(False, (False, False)), (True, (True, False)), (LeaseLost("job_1", 1, "gone"), (False, True))],
)
def test_a_lease_is_renewed_again_when_redis_is_back(
    monkeypatch: pytest.MonkeyPatch, last: bool | Exception, flags: tuple[bool, bool]
) -> None:
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.001)
    store: Any = Store(False, StoreUnavailable("away"), StoreUnavailable("away"), last)
    job: Any = SimpleNamespace(id="job_1", token=1, step=4)
    with Lease(store, job, Phase.PUBLISHING, 0.98) as held:
        until(lambda: store.beats >= 4, 5, "a fourth beat")
    assert (held.canceled, held.lost) == flags
    assert held.over == any(flags)


def test_a_drains_grace_can_be_shortened_and_not_lengthened() -> None:
    drain = Drain()
    assert (drain.asked, drain.overdue) == (False, float("-inf"))
    drain.ask(600.0)
    assert drain.asked
    assert drain.overdue < -590
    drain.ask(20.0)  # a spot notice
    drain.ask(600.0)
    assert -20 <= drain.overdue < -10
    drain.ask(0.0)
    assert drain.overdue >= 0

"""Telling the store how a job ended while Redis is away, and how long a draining node goes on."""

import pytest

from jobs.errors import IllegalTransition, JobNotFound, LeaseLost, StoreUnavailable
from worker import lease
from worker.drain import Drain
from worker.lease import tell


class Redis:
    """Away for so many calls, or with so many words against them."""

    def __init__(self, *errors: Exception) -> None:
        self.errors, self.calls = list(errors), 0

    def call(self) -> str:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return "told"


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease.time, "sleep", lambda seconds: None)


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

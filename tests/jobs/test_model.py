"""The store agrees with the Python model, on random histories and on a tour; and the check can fail."""

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test
from redis.exceptions import ResponseError

from jobs.job import FailureClass, Priority
from tests.jobs.comparison import SETTINGS, Comparison
from tests.jobs.conftest import MakeStore
from tests.jobs.machine import StoreMachine
from tests.support.planted import BUGS, harvest, plant

SEED = int(os.environ.get("REEL_TEST_SEED", "20"))
EXAMPLES = int(os.environ.get("REEL_TEST_EXAMPLES", "30"))
HIGH, NORMAL, LOW = Priority


def test_random_histories_agree_with_the_model(make_store: MakeStore) -> None:
    class Machine(StoreMachine):
        store = make_store(**SETTINGS)

    print(f"REEL_TEST_SEED={SEED} REEL_TEST_EXAMPLES={EXAMPLES}")
    run_state_machine_as_test(
        seed(SEED)(Machine),
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=40,
            deadline=None,
            phases=(Phase.generate, Phase.shrink),
            database=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )


def tour(both: Comparison) -> None:
    """A short history that passes every promise once."""
    steps = [order, lost_leases, failures, returned, canceled, deadlines, webhooks]
    for step in steps:
        step(both)
        both.check()
    both.check_webhooks()


def order(both: Comparison) -> None:
    for key in "aaabbc":
        both.submit(key, NORMAL)
    both.submit("a", LOW)
    both.submit("c", HIGH)
    for _ in range(8):
        job = both.claim()
        both.node_side(job, "heartbeat")
        both.check()
        both.node_side(job, "finish")
        both.node_side(job, "finish")  # sent again
    assert both.try_claim() is None


def lost_leases(both: Comparison) -> None:
    job = both.submit()
    both.claim()
    both.check()
    both.pass_time(job)
    assert both.claim("n2") is job  # taken over
    for call in ("heartbeat", "finish", "fail", "give_back", "cancel_running"):
        both.node_side(job, call, stale=1)
    both.pass_time(job)
    both.sweep()
    both.check()
    both.claim()
    both.pass_time(job)
    assert both.try_claim("n2") is None  # three nodes died of it
    both.check()
    both.client_side(job, "replay")
    both.node_side(both.claim(), "finish")


def failures(both: Comparison) -> None:
    for kind in FailureClass:
        job = both.submit()
        while job.state == "queued":
            assert both.claim() is job
            both.node_side(job, "fail", kind=kind)
            both.node_side(job, "fail", kind=kind)  # sent again
            both.check()
        assert both.try_claim() is None


def returned(both: Comparison) -> None:
    first = both.submit()
    both.submit()
    for _ in range(4):
        assert both.claim() is first
        both.node_side(first, "give_back")
        both.check()
    for _ in range(2):
        both.node_side(both.claim(), "finish")


def canceled(both: Comparison) -> None:
    for call in ("fail", "give_back", "cancel_running", "finish"):
        job = both.submit()
        both.claim()
        both.client_side(job, "cancel")
        both.node_side(job, call)
        both.check()
    both.client_side(both.submit(), "cancel")
    both.client_side(job, "delete")


def deadlines(both: Comparison) -> None:
    late = both.submit()
    both.pass_time(late)
    assert both.try_claim() is None
    started = both.submit()
    both.claim()
    both.node_side(started, "give_back")
    both.pass_time(started)
    both.sweep()
    both.node_side(both.claim(), "finish")


def webhooks(both: Comparison) -> None:
    for _ in range(2):
        both.submit(hooked=True)
    for _ in range(2):
        both.node_side(both.claim(), "finish")
    for outcome in ("retry", "crash", "delivered"):
        both.send_webhooks(outcome)


def test_the_tour_agrees_with_the_model(make_store: MakeStore) -> None:
    tour(Comparison(make_store(**SETTINGS)))


@pytest.fixture
def planted(request: pytest.FixtureRequest) -> Iterator[None]:
    plant(request.param)
    yield
    harvest()


@pytest.mark.parametrize("planted", BUGS, indirect=True)
@pytest.mark.usefixtures("planted")
def test_a_planted_bug_is_caught(make_store: MakeStore) -> None:
    """By the comparison, or by the table in the Lua, which stops an illegal move."""
    with pytest.raises((AssertionError, ResponseError)) as caught:
        tour(Comparison(make_store(**SETTINGS)))
    if isinstance(caught.value, ResponseError):
        assert "illegal transition" in str(caught.value)

"""The checker can fail: on planted bugs, and on each way in which a history can be wrong."""

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from jobs.client import connect
from jobs.scripts import Scripts
from jobs.settings import Settings
from jobs.store import JobStore
from tests.chaos.check import check as check_all
from tests.chaos.checks.case import Report
from tests.chaos.miniature import RULES, Miniature
from tests.conftest import SEED
from tests.support.planted import harvest, plant
from tests.support.redis import RedisServer, redis_server

JOBS = 25
Final = dict[str, Any]
History = list[dict[str, Any]]


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with redis_server() as running:
        yield running


def tour(server: RedisServer) -> tuple[History, Final]:
    """A miniature's history and final store, with whatever is planted now."""
    settings = Settings(redis_url=server.url, lease_seconds=9999, max_attempts=3)
    client = connect(settings)
    client.execute_command("FLUSHALL")
    store = JobStore(client, settings)
    store.scripts = Scripts(client, settings)
    try:
        return Miniature(store, SEED).tour(JOBS)
    finally:
        client.close()


def check(history: History, final: Final, **changes: Any) -> Report:
    return check_all(history, final, dataclasses.replace(RULES, **changes))


@pytest.fixture(scope="module")
def clean(server: RedisServer) -> tuple[History, Final]:
    return tour(server)


def test_a_right_store_passes(clean: tuple[History, Final]) -> None:
    report = check(*clean, floor=1)
    assert report.violations == []
    assert report.figures["accepted"] == JOBS
    assert report.figures["stale writes refused"] >= 5
    assert set(report.states) == {"succeeded", "failed", "canceled"}


@pytest.mark.parametrize(
    ("bug", "promise"),
    [
        ("no fencing in finish", "promise 2"),
        ("no fencing in heartbeat", "promise 2"),
        ("the lease is freed before the commit", "promise 1"),
        ("the outbox is outside the script", "promise 10"),
        ("the token does not rise", "promise 2"),
        ("a lost lease is not charged", "promise 4"),
        ("giving back costs an attempt", "promise 4"),
        ("no dead letter", "promise 4"),
    ],
)
def test_a_planted_bug_is_caught(server: RedisServer, bug: str, promise: str) -> None:
    plant(bug)
    try:
        history, final = tour(server)
    finally:
        harvest()
    broken = {violation.partition(":")[0] for violation in check(history, final).violations}
    assert promise in broken


def event(final: Final, state: str) -> tuple[str, list[dict[str, Any]]]:
    """A job of this state, and its events."""
    return next((job_id, job["events"]) for job_id, job in final["jobs"].items() if job["state"] == state)


def lose_a_job(history: History, final: Final) -> None:
    del final["jobs"][next(iter(final["jobs"]))]


def succeed_twice(history: History, final: Final) -> None:
    _, events = event(final, "succeeded")
    events.append(events[-1])


def another_owner(history: History, final: Final) -> None:
    claim = next(record for record in history if record.get("s") == "claim")
    history.append({**claim, "who": "node-9", "t": claim["t"] + 1})


def forget_a_webhook(history: History, final: Final) -> None:
    next(job for job in final["jobs"].values() if len(job["deliveries"]) > 1)["deliveries"].pop()


def never_received(history: History, final: Final) -> None:
    history.remove(next(record for record in history if record["k"] == "hook"))


def webhooks_out_of_order(history: History, final: Final) -> None:
    job_id, _ = event(final, "succeeded")
    first, second = [record for record in history if record["k"] == "hook" and record["job"] == job_id][:2]
    first["id"], second["id"] = second["id"], first["id"]


def another_body(history: History, final: Final) -> None:
    hook = next(record for record in history if record["k"] == "hook")
    history.append({**hook, "sha": "other"})


def after_410(history: History, final: Final) -> None:
    hook = next(record for record in history if record["k"] == "hook")
    history += [{**hook, "path": "/gone/1", "t": hook["t"] + later} for later in (0, 6)]


def an_error_500(history: History, final: Final) -> None:
    history.append({"k": "submit", "t": 0, "t0": 0, "idem": "x", "seed": 1, "st": 500})


def no_retry_after(history: History, final: Final) -> None:
    history.append({"k": "submit", "t": 0, "t0": 0, "idem": "x", "seed": 1, "st": 503})


def two_jobs_for_one_key(history: History, final: Final) -> None:
    first, second = [record for record in history if record["k"] == "submit"][:2]
    second["idem"] = first["idem"]


def a_key_of_nobody(history: History, final: Final) -> None:
    final["keys"].append("reel:forgotten:thing")


def a_key_of_a_vanished_job(history: History, final: Final) -> None:
    final["keys"].append("reel:events:job_gone")


def a_leaked_lease(history: History, final: Final) -> None:
    final["leases"]["leases:tiny"] = ["job_x"]


def too_many_attempts(history: History, final: Final) -> None:
    job_id, _ = event(final, "failed")
    final["jobs"][job_id]["attempts"] = 4


def canceled_too_late(history: History, final: Final) -> None:
    job_id, events = event(final, "succeeded")
    at = events[0]["ms"] / 1000 - 60
    history.append({"k": "cancel", "t": at, "t0": at, "id": job_id, "st": 409})


def another_result(history: History, final: Final) -> None:
    job_id, _ = event(final, "succeeded")
    final["jobs"][job_id]["result"]["video_key"] = f"jobs/{job_id}/99/video.mp4"


WRONG: dict[Callable[[History, Final], None], str] = {
    lose_a_job: "promise 1",
    succeed_twice: "promise 2",
    another_owner: "promise 2",
    another_result: "promise 2",
    too_many_attempts: "promise 4",
    canceled_too_late: "promise 5",
    an_error_500: "promise 8",
    no_retry_after: "promise 8",
    two_jobs_for_one_key: "promise 1",
    forget_a_webhook: "promise 10",
    never_received: "promise 10",
    webhooks_out_of_order: "promise 10",
    another_body: "promise 10",
    after_410: "promise 10",
    a_key_of_nobody: "promise 11",
    a_key_of_a_vanished_job: "promise 11",
    a_leaked_lease: "promise 11",
}


@pytest.mark.parametrize("change", WRONG, ids=lambda change: change.__name__)
def test_a_wrong_history_is_caught(
    clean: tuple[History, Final], change: Callable[[History, Final], None]
) -> None:
    history, final = copy.deepcopy(clean)
    change(history, final)
    assert WRONG[change] in {violation.partition(":")[0] for violation in check(history, final).violations}


def test_an_early_takeover_is_caught(clean: tuple[History, Final]) -> None:
    assert any("promise 3" in violation for violation in check(*clean, lease=60.0).violations)


def test_a_run_that_proves_too_little_fails(clean: tuple[History, Final]) -> None:
    history = [*clean[0], {"k": "fault", "t": 0, "fault": "kill redis"}]
    report = check(history, clean[1], floor=2, kinds=("kill redis",))
    assert report.violations == ["the run: 'kill redis' fired 1 times of 2"]
    few = check(clean[0], clean[1], least_jobs=JOBS + 1, least_faults=1)
    assert few.violations == [f"the run: {JOBS} jobs of {JOBS + 1}", "the run: 0 faults of 1"]
    quiet = [record for record in clean[0] if record.get("r") != "lost"]
    assert any("no stale write" in violation for violation in check(quiet, clean[1], floor=1).violations)

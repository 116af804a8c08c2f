"""Removing files of jobs that are gone: one that is refused stops no other, and none takes all the time."""

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from jobs.client import connect
from jobs.errors import StorageUnavailable
from jobs.settings import Settings
from jobs.store import JobStore
from jobs.sweep import SweepReport
from jobs.uploads import UploadIndex
from worker import sweeper
from worker.sweeper import BATCH, remove_files, sweep


class Storage:
    """S3 that refuses what `refused` names, and takes `seconds` for each call."""

    def __init__(self, *refused: str, seconds: float = 0.0, error: type[Exception] = StorageUnavailable):
        self.refused, self.seconds, self.error = refused, seconds, error
        self.asked: list[str] = []

    def delete_prefix(self, prefix: str) -> int:
        self.delete(prefix)
        return 1

    def delete(self, key: str) -> None:
        self.asked.append(key)
        time.sleep(self.seconds)
        if key in self.refused:
            raise self.error(f"could not delete {key}: AccessDenied")


class Bench:
    """What is to be removed, and the removing."""

    def __init__(self, settings: Settings, store: JobStore) -> None:
        self.store, self.redis = store, connect(settings)
        self.uploads = UploadIndex(self.redis, settings)

    def fill(self, jobs: int, images: int) -> None:
        for number in range(jobs):
            self.redis.execute_command("ZADD", "reel:garbage", number + 1, f"job_{number}")
        for number in range(images):
            self.redis.execute_command("ZADD", "reel:uploads", number + 1, f"uploads/key_a/img_{number}")

    def remove(self, storage: Any) -> int:
        return remove_files(self.store, storage, self.uploads)

    def left(self) -> list[str]:
        return self.store.garbage(10_000) + self.redis.execute_command("ZRANGE", "reel:uploads", 0, -1)


@pytest.fixture
def bench(settings: Settings, store: JobStore) -> Bench:
    return Bench(settings, store)


@pytest.mark.parametrize("error", [StorageUnavailable, OSError, ValueError])
def test_one_that_is_refused_stops_no_other(bench: Bench, error: type[Exception]) -> None:
    bench.fill(20, 5)
    storage = Storage("jobs/job_0/", "uploads/key_a/img_0", error=error)
    assert bench.remove(storage) == 23
    assert sorted(storage.asked) == sorted(set(storage.asked)), "each is tried once a call"
    assert bench.left() == ["job_0", "uploads/key_a/img_0"]
    assert bench.uploads.due() == [], "put off"


def test_the_refused_ones_go_to_the_end(bench: Bench) -> None:
    bench.fill(3, 0)
    bench.remove(Storage("jobs/job_0/"))
    now = bench.redis.execute_command("TIME")[0]
    bench.redis.execute_command("ZADD", "reel:garbage", int(now) - 60, "job_new")
    assert bench.store.garbage() == ["job_new", "job_0"]
    assert bench.remove(Storage()) == 2
    assert bench.left() == []


def test_one_call_removes_several_batches(bench: Bench) -> None:
    bench.fill(2 * BATCH + 1, BATCH + 1)
    assert bench.remove(Storage()) == 3 * BATCH + 2
    assert bench.left() == []


def test_a_slow_storage_is_left_in_time_with_both_kinds_begun(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeper, "REMOVE_SECONDS", 1.0)
    bench.fill(BATCH, BATCH)
    storage = Storage(seconds=0.05)
    began = time.monotonic()
    removed = bench.remove(storage)
    assert time.monotonic() - began < 5, "all would take 10 s"
    assert 2 <= removed < BATCH
    kinds: list[Callable[[str], bool]] = [lambda key: key[:4] == "jobs", lambda key: key[:7] == "uploads"]
    assert all(any(map(kind, storage.asked)) for kind in kinds)


def test_a_sweep_goes_on_until_a_pass_finds_little_and_not_for_ever() -> None:
    passes = [SweepReport(expired=["job"] * BATCH), SweepReport(requeued=["job"] * BATCH), SweepReport()]
    store: Any = SimpleNamespace(sweep=lambda limit: passes.pop(0))
    assert sweep(store) == 2 * BATCH
    assert passes == []
    endless: Any = SimpleNamespace(sweep=lambda limit: SweepReport(purged=["job"] * limit))
    assert sweep(endless) == sweeper.ROUNDS * BATCH

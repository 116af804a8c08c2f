"""The claim loop when the node, not its ranks, is in trouble: S3 away or slow, a full disk, a bad folder."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import worker.lease
from jobs.client import connect
from jobs.errors import StorageUnavailable, StoreUnavailable
from jobs.job import FailureClass, Job, JobState
from jobs.settings import Settings
from jobs.store import JobStore
from tests.support.jobs import new_job, video_request
from tests.support.node import until
from worker import patience
from worker.claims import ClaimLoop
from worker.drain import Drain
from worker.group import GroupBroken
from worker.patience import Rest
from worker.publish import Finished, Publisher
from worker.reports import RankReport, Stop
from worker.spool import Spool
from worker.video import VideoFacts

LEASE = 1.2


class Storage:
    """S3 that is away while `up` is not set, and takes `seconds` for a download."""

    def __init__(self) -> None:
        self.up, self.seconds, self.asked = threading.Event(), 0.0, 0

    def get_file(self, key: str, path: Path) -> None:
        self.asked += 1
        time.sleep(self.seconds)
        if not self.up.is_set():
            raise StorageUnavailable(f"could not download {key}: connection refused")
        path.write_bytes(b"image")

    def put_file(self, key: str, path: Path, content_type: str) -> None:
        assert path.exists(), key

    def delete_prefix(self, prefix: str) -> int:
        return 0


class Group:
    """Ranks that refuse every request, after they were seen to get it, unless another `outcome` is set."""

    leader = None

    def __init__(self) -> None:
        self.images: list[bytes] = []
        self.outcome: RankReport | GroupBroken = RankReport(
            0, "failed", failure=FailureClass.USER, detail="the ranks had it"
        )
        self.failures = self.starts = self.ends = 0  # failures: starts that fail

    def generate(self, job: Job, request: Any, folder: Path) -> RankReport:
        self.images.append(request.image.read_bytes() if request.image else b"")
        if isinstance(self.outcome, GroupBroken):
            raise self.outcome
        return self.outcome

    def start(self) -> None:
        self.starts += 1
        if self.starts <= self.failures:
            raise GroupBroken(FailureClass.INFRASTRUCTURE, "a rank did not start")

    def end(self) -> None:
        self.ends += 1


class Bench:
    """A claim loop with everything but ranks."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.store = JobStore(connect(settings), settings)
        self.storage, self.group, self.drain = Storage(), Group(), Drain()
        self.spool = Spool(folder / "work")
        self.publisher = Publisher(self.store, self.storage, self.spool, self.drain)  # type: ignore[arg-type]
        self.loop = ClaimLoop(
            "tiny", "node-a", self.store, self.storage, self.group,  # type: ignore[arg-type]
            self.publisher, self.spool, self.drain,
        )  # fmt: skip

    def submit(self, *, image: bool = True) -> str:
        asked = video_request(image="uploads/key_a/img_x.png" if image else None)
        return self.store.submit(new_job().model_copy(update={"request": asked}))[0].id

    def claimed(self, *, image: bool = True) -> Job:
        self.submit(image=image)
        job = self.store.claim("tiny", "node-a")
        assert job is not None
        return job

    @contextmanager
    def running(self) -> Iterator[None]:
        thread = threading.Thread(target=self.loop.run, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self.drain.ask(0)
            thread.join(10)
        assert not thread.is_alive()


@pytest.fixture
def bench(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr(worker.lease, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(patience, "FIRST_DELAY", 0.1)
    return Bench(settings.model_copy(update={"lease_seconds": LEASE, "poll_seconds": 0.1}), tmp_path)


@pytest.mark.parametrize("slow", [False, True])
def test_s3_away_or_slow_charges_no_attempt_of_an_image_job(bench: Bench, slow: bool) -> None:
    job_id = bench.submit()
    if slow:
        bench.storage.up.set()
        bench.storage.seconds = 2 * LEASE
    with bench.running():
        until(lambda: bench.storage.asked > (0 if slow else 1), 5, "a download")
        time.sleep(1.5 * LEASE)
        assert bench.store.sweep().total == 0, "the lease is kept"
        held = bench.store.get(job_id)
        assert (held.state, held.attempts) == (JobState.RUNNING, 0)
        bench.storage.up.set()
        until(lambda: bench.group.images == [b"image"], 5, "the ranks to get the image")


@pytest.mark.parametrize("why", ["cancel", "drain", "lost"])
def test_a_job_whose_image_cannot_be_had_ends_as_it_is_told(bench: Bench, why: str) -> None:
    job_id = bench.submit()
    with bench.running():
        until(lambda: bench.storage.asked, 5, "a download")
        job = bench.store.get(job_id)
        if why == "cancel":
            bench.store.cancel(job_id)
            until(lambda: bench.store.get(job_id).state is JobState.CANCELED, 5, "the cancel")
        elif why == "lost":
            bench.store.give_back(job_id, job.token)
            until(lambda: bench.store.get(job_id).token > job.token, 5, "another claim")
    if why != "cancel":
        given = bench.store.get(job_id)
        assert (given.state, given.attempts) == (JobState.QUEUED, 0)
    assert list(bench.spool.root.glob("*")) == []
    assert bench.group.images == []


def test_an_image_that_is_gone_is_the_requests_fault(bench: Bench) -> None:
    def gone(key: str, path: Path) -> None:
        raise FileNotFoundError(key)

    bench.storage.get_file = gone  # type: ignore[method-assign]
    job_id = bench.submit()
    with bench.running():
        until(lambda: bench.store.get(job_id).state is JobState.FAILED, 5, "its end")
    error = bench.store.get(job_id).error
    assert error is not None
    assert error.failure_class is FailureClass.USER
    assert list(bench.spool.root.glob("*")) == []


def test_a_node_with_a_full_disk_rests_and_leaves_the_queue_alone(bench: Bench) -> None:
    ids = [bench.submit(image=False) for _ in range(20)]

    def full(job: Job) -> Path:
        raise FileNotFoundError(28, "No space left on device")  # whichever OSError: no request's fault

    bench.spool.folder = full  # type: ignore[method-assign]

    def charged() -> int:
        return sum(bench.store.get(job_id).attempts for job_id in ids)

    began = time.monotonic()
    with bench.running():
        until(lambda: charged() == 2, 10, "a second claim")
        assert time.monotonic() - began >= 1.0
    assert charged() == 2
    assert not any(bench.store.get(job_id).terminal for job_id in ids)


def test_a_bad_spool_folder_costs_one_attempt_and_goes(bench: Bench) -> None:
    """Facts of a video that isn't there."""
    job_id = bench.submit(image=False)
    folder = bench.spool.root / job_id / "1"
    folder.mkdir(parents=True)
    facts = VideoFacts(job_id, 64, 48, 5, 16.0, 1, "0" * 64)
    (folder / "facts.json").write_text(json.dumps(asdict(facts)))
    began = time.monotonic()
    with bench.running():
        until(lambda: bench.group.images, 5, "the ranks to make it anew")
        assert time.monotonic() - began >= 1.0, "the node rests after a failure of its own"
    assert bench.store.get(job_id).attempts == 2  # the second is the ranks' refusal
    assert not folder.exists()


def test_a_claim_under_way_does_not_get_what_the_publisher_gives_up(bench: Bench) -> None:
    """It had asked for the rest before the failure, and took the job again at once."""
    job = bench.claimed(image=False)
    begin = bench.store.claim
    failing = threading.Thread(
        target=bench.publisher._give_up, args=(Finished(job, bench.spool.folder(job)), "no video")
    )

    def slow(model: str, node_id: str) -> Job | None:
        failing.start()
        failing.join(0.5)
        return begin(model, node_id)

    bench.store.claim = slow  # type: ignore[method-assign]
    assert bench.loop.claim() is None
    failing.join(5)
    assert bench.store.get(job.id).state is JobState.QUEUED
    bench.store.claim = begin  # type: ignore[method-assign]
    assert 0 < bench.publisher.rest.left <= 1
    assert bench.loop.claim() is None, "the node rests"


def test_rests_grow_and_a_success_ends_them() -> None:
    rest = Rest()
    assert rest.left == 0
    assert [rest.failed() for _ in range(7)] == [1, 2, 4, 8, 16, 30, 30]
    assert 29 < rest.left <= 30
    rest.worked()
    assert rest.left == 0
    assert rest.failed() == 1


def test_a_cancel_during_a_download_keeps_the_ranks_free(bench: Bench) -> None:
    job = bench.claimed()

    def slow(key: str, path: Path) -> None:
        bench.store.cancel(job.id)
        path.write_bytes(b"image")
        time.sleep(0.4)  # the lease's thread reads the flag meanwhile

    bench.storage.get_file = slow  # type: ignore[method-assign]
    bench.loop.work(job)
    assert bench.store.get(job.id).state is JobState.CANCELED
    assert bench.group.images == []


def test_a_drained_node_ends_after_what_it_publishes(bench: Bench) -> None:
    release = threading.Event()
    job = bench.claimed(image=False)
    bench.publisher.take(Finished(job, bench.spool.folder(job), lambda: release.wait(10) and None))
    bench.drain.ask(60.0)
    loop = threading.Thread(target=bench.loop.run, daemon=True)
    loop.start()
    loop.join(0.2)
    assert loop.is_alive()
    release.set()
    loop.join(10)
    assert not loop.is_alive()
    assert bench.publisher.job is None


def test_an_image_that_the_disk_does_not_take_leaves_nothing(bench: Bench) -> None:
    def full(key: str, path: Path) -> None:
        path.write_bytes(b"ima")
        raise OSError(28, "No space left on device")

    bench.storage.get_file = full  # type: ignore[method-assign]
    job = bench.claimed()
    bench.loop.work(job)
    now = bench.store.get(job.id)
    assert (now.state, now.attempts) == (JobState.QUEUED, 1)
    assert list(bench.spool.root.glob("*")) == []


@pytest.mark.parametrize(
    ("stop", "state"),
    [("cancel", JobState.CANCELED), ("drain", JobState.QUEUED), ("lease_lost", JobState.RUNNING)],
)
def test_what_follows_when_the_ranks_stopped(bench: Bench, stop: Stop, state: JobState) -> None:
    """Each is free without an attempt charged; of a lost one nothing is said."""
    job = bench.claimed(image=False)
    if stop == "cancel":
        bench.store.cancel(job.id)
    bench.group.outcome = RankReport(0, "stopped", stop=stop)
    bench.loop.work(job)
    now = bench.store.get(job.id)
    assert (now.state, now.attempts) == (state, 0)
    assert list(bench.spool.root.glob("*")) == []


@pytest.mark.parametrize(("grace", "attempts", "starts"), [(None, 1, 1), (60.0, 1, 0), (0.0, 0, 0)])
def test_a_job_is_free_before_its_broken_ranks_come_back(
    bench: Bench, grace: float | None, attempts: int, starts: int
) -> None:
    """Ranks that a drain killed after its grace cost no attempt, and a draining node starts none."""
    job = bench.claimed(image=False)
    if grace is not None:
        bench.drain.ask(grace)
    states: list[JobState] = []
    bench.group.end = lambda: states.append(bench.store.get(job.id).state)  # type: ignore[method-assign]
    bench.group.outcome = GroupBroken(FailureClass.INFRASTRUCTURE, "a rank died")
    bench.loop.work(job)
    assert states == [JobState.QUEUED]
    assert (bench.store.get(job.id).attempts, bench.group.starts) == (attempts, starts)
    assert list(bench.spool.root.glob("*")) == []


@pytest.mark.parametrize("failures", [2, 3])
def test_ranks_have_three_tries_to_come_back(bench: Bench, failures: int) -> None:
    bench.group.failures = failures
    if failures == 3:
        with pytest.raises(GroupBroken):
            bench.loop.start_group()
    else:
        bench.loop.start_group()
    assert (bench.group.starts, bench.group.ends) == (3, failures)


def test_a_redis_that_is_away_ends_no_claim_loop(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: object) -> Job:
        raise StoreUnavailable("away")

    job_id = bench.submit()
    with monkeypatch.context() as patch:
        patch.setattr(bench.store, "claim", away)
        assert bench.loop.claim() is None
    job = bench.loop.claim()
    assert job is not None
    assert job.id == job_id

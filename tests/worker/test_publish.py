"""Publishing against real Redis and S3: commit, stale owner, cancel, S3 away, drain, the spool's memory."""

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from jobs.errors import StoreUnavailable
from jobs.job import Job, JobState, VideoResult
from jobs.settings import Settings
from jobs.storage import ObjectStore
from jobs.store import JobStore
from tests.support.jobs import new_job, result
from tests.support.node import until
from tests.support.proxy import Proxy
from worker import publish
from worker.drain import Drain
from worker.publish import Finished, Publisher
from worker.spool import KEEP_SECONDS, Spool
from worker.video import FACTS, VideoFolder, read_facts


class Bench:
    """A publisher with everything around it, without ranks."""

    def __init__(self, settings: Settings, storage: ObjectStore, store: JobStore, folder: Path) -> None:
        self.settings, self.storage, self.store = settings, storage, store
        self.spool = Spool(folder / "work")
        self.drain = Drain()
        self.publisher = Publisher(store, storage, self.spool, self.drain)
        self.sinks: list[VideoFolder] = []

    def claimed(self) -> Job:
        self.store.submit(new_job())
        job = self.store.claim("tiny", "node-a")
        assert job is not None
        return job

    def made(self, job: Job) -> Finished:
        """A job whose video has been written, with the end of the file still to come."""
        folder = self.spool.folder(job)
        sink = VideoFolder(folder, job.id, 16.0)
        self.sinks.append(sink)
        sink.write(np.random.default_rng(0).integers(0, 255, (5, 48, 64, 3), dtype=np.uint8))
        return Finished(job, folder, lambda: sink.finish({"denoising": 1.0}, {"job": job.id}) and None)

    def keys(self, job: Job) -> list[str]:
        return self.storage.list_keys(f"jobs/{job.id}/")


@pytest.fixture
def bench(s3_settings: Settings, storage: ObjectStore, store: JobStore, tmp_path: Path) -> Iterator[Bench]:
    found = Bench(s3_settings, storage, store, tmp_path)
    yield found
    for sink in found.sinks:
        sink.abort()


def test_a_finished_video_is_committed_and_leaves_the_disk(bench: Bench) -> None:
    job = bench.claimed()
    for _ in range(6):
        bench.publisher.rest.failed()
    bench.publisher.take(bench.made(job))
    bench.publisher.wait()
    assert bench.publisher.rest.left == 0, "whatever was wrong with this node is over"
    done = bench.store.get(job.id)
    assert done.state is JobState.SUCCEEDED
    assert done.result is not None
    assert bench.keys(job) == sorted(
        [done.result.video_key, done.result.poster_key, done.result.manifest_key]
    )
    head = bench.storage.head(done.result.video_key)
    assert head is not None
    assert (head.bytes, head.content_type) == (done.result.bytes, "video/mp4")
    manifest = json.loads(bench.storage.get_bytes(done.result.manifest_key))
    assert manifest["video"]["sha256"] == done.result.sha256
    assert not (bench.spool.root / job.id).exists()


@pytest.mark.parametrize("ended", [False, True])
def test_a_stale_owner_commits_nothing_and_removes_its_own_objects(bench: Bench, ended: bool) -> None:
    """The lease goes to another node between the upload and the commit; that one may be done first."""
    job = bench.claimed()
    finished = bench.made(job)
    real, theirs = bench.store.finish, list[VideoResult]()

    def late(*args: object) -> Job:
        bench.store.give_back(job.id, job.token)
        other = bench.store.claim("tiny", "node-b")
        assert other is not None
        theirs.append(result(job.id, other.token))
        bench.storage.put_bytes(theirs[0].video_key, b"theirs", "video/mp4")
        if ended:
            real(job.id, other.token, theirs[0])
        return real(*args)  # type: ignore[arg-type]

    bench.store.finish = late  # type: ignore[method-assign]
    bench.publisher.take(finished)
    bench.publisher.wait()
    now = bench.store.get(job.id)
    assert (now.state, now.owner) == (JobState.SUCCEEDED if ended else JobState.RUNNING, "node-b")
    assert now.token > job.token
    assert now.result == (theirs[0] if ended else None)
    assert bench.keys(job) == [theirs[0].video_key]


@pytest.mark.parametrize("stop", ["lease", "drain"])
def test_a_commit_whose_reply_was_lost_keeps_its_files(bench: Bench, stop: str) -> None:
    """Redis has the result and nobody was told: the job is over, so every other call says "lost"."""
    job = bench.claimed()
    real = bench.store.finish

    def unheard(*args: object) -> Job:
        real(*args)  # type: ignore[arg-type]
        if stop == "drain":
            bench.drain.ask(0)
        raise StoreUnavailable("the reply was lost")

    bench.store.finish = unheard  # type: ignore[method-assign]
    bench.publisher.take(bench.made(job))
    bench.publisher.wait()
    done = bench.store.get(job.id)
    assert done.state is JobState.SUCCEEDED
    assert done.result is not None
    assert done.result.video_key in bench.keys(job)
    assert len(bench.keys(job)) == 3
    assert not (bench.spool.root / job.id).exists()


def test_a_redis_that_is_away_at_the_commit_is_waited_for(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish, "pause", lambda *_: None)
    real, away = bench.store.finish, [StoreUnavailable("away")] * 3

    def finish(*args: object) -> Job:
        if away:
            raise away.pop()
        return real(*args)  # type: ignore[arg-type]

    bench.store.finish = finish  # type: ignore[method-assign]
    job = bench.claimed()
    bench.publisher.take(bench.made(job))
    bench.publisher.wait()
    done = bench.store.get(job.id)
    assert (done.state, done.attempts, len(bench.keys(job))) == (JobState.SUCCEEDED, 0, 3)


def test_a_late_cancel_wins_while_nothing_is_committed(bench: Bench) -> None:
    job = bench.claimed()
    finished = bench.made(job)

    def slow_close() -> None:
        assert finished.close is not None
        finished.close()
        bench.store.cancel(job.id)
        time.sleep(2.5)  # the lease's thread reads the flag meanwhile

    bench.publisher.take(Finished(job, finished.folder, slow_close))
    bench.publisher.wait()
    assert bench.store.get(job.id).state is JobState.CANCELED
    assert bench.keys(job) == []
    assert not (bench.spool.root / job.id).exists()


def test_s3_away_keeps_the_lease_and_the_file(bench: Bench) -> None:
    host, port = (bench.settings.s3_endpoint or "").removeprefix("http://").split(":")
    proxy = Proxy((host, int(port)))
    storage = ObjectStore(bench.settings.model_copy(update={"s3_endpoint": f"http://127.0.0.1:{proxy.port}"}))
    publisher = Publisher(bench.store, storage, bench.spool, bench.drain)
    job = bench.claimed()
    proxy.down()
    publisher.take(bench.made(job))
    until(lambda: proxy.refused >= 2, 20, "refused uploads")
    time.sleep(bench.settings.lease_seconds + 0.5)
    assert bench.store.claim("tiny", "node-b") is None, "the lease is kept"
    proxy.up = True
    publisher.wait()
    proxy.close()
    assert bench.store.get(job.id).state is JobState.SUCCEEDED


def test_at_most_one_is_published_and_the_waiting_one_keeps_its_lease(bench: Bench) -> None:
    first, second = bench.claimed(), bench.claimed()
    slow, release = bench.made(first), threading.Event()

    def held() -> None:
        release.wait(30)
        assert slow.close is not None
        slow.close()

    bench.publisher.take(Finished(first, slow.folder, held))
    waiting = threading.Thread(target=bench.publisher.take, args=(bench.made(second),))
    waiting.start()
    time.sleep(bench.settings.lease_seconds + 1)
    assert waiting.is_alive()
    assert bench.publisher.job is not None
    assert bench.publisher.job.id == first.id
    assert bench.store.claim("tiny", "node-b") is None, "neither lease has run out"
    release.set()
    waiting.join(20)
    bench.publisher.wait()
    assert {bench.store.get(job.id).state for job in (first, second)} == {JobState.SUCCEEDED}


def test_a_drain_gives_back_what_cannot_be_uploaded_and_the_video_is_not_made_again(bench: Bench) -> None:
    storage = ObjectStore(bench.settings.model_copy(update={"s3_endpoint": "http://127.0.0.1:9"}))
    publisher = Publisher(bench.store, storage, bench.spool, bench.drain)
    job = bench.claimed()
    publisher.take(bench.made(job))
    until(lambda: bench.spool.finished(job.id), 10, "the finished file")
    bench.drain.ask(0.5)
    publisher.wait()
    given = bench.store.get(job.id)
    assert (given.state, given.attempts) == (JobState.QUEUED, 0)
    again = bench.store.claim("tiny", "node-a")
    assert again is not None
    folder = bench.spool.finished(again.id)
    assert folder is not None
    later = Publisher(bench.store, bench.storage, bench.spool, Drain())
    later.take(Finished(again, folder))
    later.wait()
    done = bench.store.get(job.id)
    assert done.state is JobState.SUCCEEDED
    assert done.result is not None
    assert done.result.video_key == f"jobs/{job.id}/{again.token}/video.mp4"


def test_a_writer_that_died_fails_the_attempt(bench: Bench) -> None:
    job = bench.claimed()
    folder = bench.spool.folder(job)

    def died() -> None:
        raise ConnectionError("the rank is gone")

    newer = bench.spool.folder(job.model_copy(update={"token": job.token + 1}))
    bench.publisher.take(Finished(job, folder, died))
    bench.publisher.wait()
    now = bench.store.get(job.id)
    assert (now.state, now.attempts) == (JobState.QUEUED, 1)
    assert (folder.exists(), newer.exists()) == (False, True), "its own folder goes, a later attempt's stays"


def test_a_writer_that_a_drain_ends_costs_no_attempt(bench: Bench) -> None:
    """Ranks that run on after the grace are killed, with the end of the video before still to be written."""
    job = bench.claimed()
    folder = bench.spool.folder(job)

    def killed() -> None:
        bench.drain.ask(0)
        raise ConnectionError("the rank is gone")

    bench.publisher.take(Finished(job, folder, killed))
    bench.publisher.wait()
    now = bench.store.get(job.id)
    assert (now.state, now.attempts) == (JobState.QUEUED, 0)
    assert not folder.exists()


def test_a_video_that_is_gone_from_the_disk_is_not_waited_for(bench: Bench) -> None:
    job = bench.claimed()
    finished = bench.made(job)

    def close() -> None:
        assert finished.close is not None
        finished.close()
        (finished.folder / "video.mp4").unlink()

    bench.publisher.take(Finished(job, finished.folder, close))
    try:
        until(lambda: bench.store.get(job.id).attempts == 1, 10, "the failed attempt")
    finally:
        bench.drain.ask(0)
        bench.publisher.wait()
    assert bench.store.get(job.id).state is JobState.QUEUED
    assert bench.publisher.rest.left > 0


def test_the_spool_keeps_whole_videos_and_drops_half_ones(bench: Bench) -> None:
    whole, half = bench.claimed(), bench.claimed()
    finished = bench.made(whole)
    assert finished.close is not None
    finished.close()
    bench.made(half)  # ffmpeg still runs
    found = list(Spool(bench.spool.root).tidy())
    assert found == [(whole.id, whole.token, finished.folder)]
    assert not (bench.spool.root / half.id / "1").exists()
    facts = read_facts(finished.folder)
    assert facts is not None
    assert (facts.frames, facts.width, facts.height, facts.fps) == (5, 64, 48, 16.0)


def test_videos_that_nobody_fetched_for_a_day_make_room(bench: Bench) -> None:
    """A node that runs for weeks and now and then loses a lease does not fill its disk."""
    old, fresh, running = bench.claimed(), bench.claimed(), bench.claimed()
    for job in (old, fresh):
        finished = bench.made(job)
        assert finished.close is not None
        finished.close()
    then = time.time() - KEEP_SECONDS - 1
    os.utime(bench.spool.attempt(old) / FACTS, (then, then))
    writing = bench.spool.folder(running)
    bench.spool.folder(bench.claimed())
    assert not (bench.spool.root / old.id).exists()
    assert bench.spool.finished(fresh.id) is not None
    assert writing.exists()

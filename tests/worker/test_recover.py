"""What a node's new cluster makes of the videos that an earlier one finished and did not commit."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest

from jobs.client import connect
from jobs.job import FailureClass, Job, JobError
from jobs.settings import Settings
from jobs.store import JobStore
from tests.support.jobs import new_job, result
from worker import lease, node
from worker.publish import Finished
from worker.spool import Spool
from worker.video import VideoFacts

T = TypeVar("T")


class Bench:
    """A node's spool and what it does with it at a start."""

    def __init__(self, folder: Path) -> None:
        self.spool = Spool(folder)
        self.taken: list[Finished] = []

    def finished(self, job: Job) -> Path:
        """The folder of a whole video."""
        folder = self.spool.folder(job)
        (folder / "video.mp4").write_bytes(b"x")
        facts = VideoFacts(job.id, 64, 48, 5, 16.0, 1, "0" * 64)
        (folder / "facts.json").write_text(json.dumps(asdict(facts)))
        return folder

    def recover(self, store: JobStore) -> None:
        actor: Any = SimpleNamespace(
            spool=self.spool,
            store=store,
            plan=SimpleNamespace(node_id="node-a"),
            publisher=SimpleNamespace(take=self.taken.append),
        )
        node.NodeActor._recover(actor)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_ours_is_published_and_what_nobody_wants_goes(bench: Bench, store: JobStore) -> None:
    ours, theirs, gone = (store.submit(new_job())[0] for _ in range(3))
    mine = store.claim("tiny", "node-a")
    other = store.claim("tiny", "node-b")
    assert (mine and mine.id, other and other.id) == (ours.id, theirs.id)
    assert mine is not None
    assert other is not None
    folders = [bench.finished(job) for job in (mine, other, gone)]
    store.cancel(gone.id)
    store.delete(gone.id)
    bench.recover(store)
    assert [(one.job.id, one.folder) for one in bench.taken] == [(mine.id, folders[0])]
    assert [folder.exists() for folder in folders] == [True, True, False]


def test_a_failed_jobs_video_waits_for_a_replay_and_nothing_stale_or_old_is_published(
    bench: Bench, store: JobStore
) -> None:
    folders: dict[str, Path] = {}
    for name in ("failed", "done", "stale", "old"):
        store.submit(new_job())
        job = store.claim("tiny", "node-a")
        assert job is not None
        folders[name] = bench.finished(job)
        if name == "failed":
            error = JobError(type="x", title="x", detail="x", failure_class=FailureClass.USER)
            store.fail(job.id, job.token, error)
        elif name == "done":
            store.finish(job.id, job.token, result(job.id, job.token))
        elif name == "stale":  # ours again, by a later token
            store.give_back(job.id, job.token)
            assert store.claim("tiny", "node-a") is not None
        else:
            os.utime(folders[name] / "facts.json", (1, 1))
    bench.recover(store)
    assert bench.taken == []
    assert {name for name, folder in folders.items() if folder.exists()} == {"failed", "stale"}


def test_redis_away_is_no_reason_to_drop_a_video(
    bench: Bench, store: JobStore, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Minutes of eight GPUs, thrown away because nobody could say whose they are."""

    asked: list[float] = []

    def tell(call: Callable[[], T], seconds: float = 60.0) -> T | None:
        asked.append(seconds)
        return lease.tell(call, 0.1)

    monkeypatch.setattr(node, "tell", tell)
    jobs = [store.submit(new_job())[0] for _ in range(2)]
    for job in jobs:
        bench.finished(job)
    away = settings.model_copy(update={"redis_url": f"unix://{settings.data_dir}/none.sock"})
    bench.recover(JobStore(connect(away), away))
    assert all(bench.spool.finished(job.id) for job in jobs)
    assert len(asked) == 1, "one minute of waiting, not one a video"

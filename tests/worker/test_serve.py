"""What an operator sees when a node or Celery can't start: one line and exit code 1."""

import logging
import shutil
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.settings import Settings
from worker import celery_app
from worker import serve as serve_module
from worker.serve import make_plan, prepare_bucket, run_celery, run_node


@pytest.fixture(autouse=True)
def _logging() -> Iterator[None]:
    """Put the root logger back as it was."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    text = capsys.readouterr().err
    assert text.count("\n") == 1, text
    assert "Traceback" not in text
    return text


def test_redis_away(capsys: pytest.CaptureFixture[str]) -> None:
    nowhere = Settings(redis_url="redis://:secret@127.0.0.1:9/0", start_seconds=0)
    assert run_node(nowhere, Path()) == 1
    line = one_line(capsys)
    assert line.startswith("reel node: Redis at 127.0.0.1:9/0 cannot be reached")
    assert "secret" not in line
    assert run_celery(nowhere, "beat") == 1
    assert "REEL_REDIS_URL" in one_line(capsys)


def test_s3_away(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    away = {"s3_endpoint": "http://127.0.0.1:9", "s3_access_key": "a", "s3_secret_key": "b"}
    nowhere = Settings(redis_url=settings.redis_url, start_seconds=0, **away)
    assert run_node(nowhere, Path()) == 1
    assert "REEL_S3_ENDPOINT" in one_line(capsys)


def test_celery_needs_the_secret_key_and_a_known_role(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_celery(settings.model_copy(update={"secret_key": None}), "worker") == 1
    assert "REEL_SECRET_KEY" in one_line(capsys)
    assert run_celery(settings, "chef") == 1
    assert "worker, beat or all" in one_line(capsys)


def test_celery_serves_while_s3_says_nothing(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, served = threading.Event(), threading.Event()

    def look(settings: Settings) -> str | None:
        asked.set()
        return None if served.wait(10) else "nobody served before the bucket was there"

    def serve(settings: Settings, role: str) -> int:
        assert asked.wait(10)
        served.set()
        return 0

    monkeypatch.setattr(serve_module, "made_bucket_missing", look)
    monkeypatch.setattr(celery_app, "serve", serve)
    assert run_celery(settings, "worker") == 0
    assert served.is_set()


def test_celery_makes_the_bucket_of_an_s3_that_came_late(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    looks = iter(["S3 is away", "S3 is away", "S3 is away", None])
    monkeypatch.setattr(serve_module, "made_bucket_missing", lambda settings: next(looks))
    monkeypatch.setattr(serve_module, "BUCKET_SECONDS", 0.01)
    caplog.set_level(logging.INFO)
    prepare_bucket(settings.model_copy(update={"start_seconds": 0}))
    assert next(looks, "used up") == "used up"
    assert "looking on: S3 is away" in caplog.text
    assert "the bucket is there now" in caplog.text


def test_a_node_is_told_no_secret_key_and_finds_its_work_again(settings: Settings, tmp_path: Path) -> None:
    """Nodes neither check keys nor sign; and what a node of the same name finished waits in its folder."""
    assert settings.secret_key is not None
    named = settings.model_copy(update={"node_id": "n1", "node_ranks": 1})
    first, again, other = (
        make_plan(one, tmp_path, None)
        for one in (named, named, settings.model_copy(update={"node_ranks": 1}))
    )
    try:
        assert [plan.settings.secret_key for plan in (first, other)] == [None, None]
        assert first.node_id == first.settings.node_id == "n1"
        assert first.work_dir == again.work_dir == settings.data_dir / "work" / "n1"
        assert other.node_id not in ("", "n1")
        assert other.node_id == other.settings.node_id == other.work_dir.name
        assert first.run_dir != again.run_dir
        assert stat.S_ISFIFO(first.log_pipe.stat().st_mode)
    finally:
        for plan in (first, again, other):
            shutil.rmtree(plan.run_dir)

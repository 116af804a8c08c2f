"""What an operator sees when a node or Celery can't start: one line and exit code 1."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.settings import Settings
from worker.serve import run_celery, run_node


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

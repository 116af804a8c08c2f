"""One deployment for the tests of this room that need one: docker-compose.yml's services as processes."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.tiny import make_tiny
from tests.ops.compose import Deployment, until
from tests.ops.fleet import Fleet


@pytest.fixture(scope="session")
def deployment() -> Iterator[Deployment]:
    """Redis and S3, healthy; the rest is for the tests to start."""
    folder = Path(tempfile.mkdtemp(prefix="reel-ops-", dir="/tmp"))  # short: sockets' paths are limited
    make_tiny(folder / "model", seed=1)
    made = Deployment(folder, folder / "model")
    try:
        for service in ("redis", "s3"):
            made.start(service)
        for service in ("redis", "s3"):
            until(lambda service=service: made.healthy(service), 60, service)  # type: ignore[misc]
        yield made
    finally:
        made.close()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def fleet(deployment: Deployment) -> Iterator[Fleet]:
    """What a customer sees of it."""
    made = Fleet(deployment)
    try:
        yield made
    finally:
        made.close()

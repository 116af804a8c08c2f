"""Shared by the worker's tests: one Redis and one S3 for the room."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.client import connect
from jobs.settings import Settings
from jobs.storage import ObjectStore
from jobs.store import JobStore
from tests.support.redis import RedisServer, redis_server
from tests.support.s3 import S3Server, s3_server

SECRET_KEY = "a secret key for tests"


@pytest.fixture(scope="session")
def _redis() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


@pytest.fixture(scope="session")
def _s3() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture
def settings(_redis: RedisServer, tmp_path: Path) -> Settings:
    """Settings over an empty Redis."""
    found = Settings(
        redis_url=_redis.url,
        secret_key=SECRET_KEY,
        allow_loopback_callbacks=True,
        lease_seconds=5.0,
        poll_seconds=0.2,
        data_dir=tmp_path,
    )
    connect(found).flushdb()
    return found


@pytest.fixture
def s3_settings(settings: Settings, _s3: S3Server) -> Settings:
    """The same with S3."""
    return settings.model_copy(
        update={
            "s3_endpoint": _s3.endpoint,
            "s3_access_key": _s3.access_key,
            "s3_secret_key": Settings(s3_secret_key=_s3.secret_key).s3_secret_key,
        }
    )


@pytest.fixture
def store(settings: Settings) -> JobStore:
    """The job store."""
    return JobStore(connect(settings), settings)


@pytest.fixture
def storage(s3_settings: Settings) -> ObjectStore:
    """The bucket, which exists."""
    found = ObjectStore(s3_settings)
    found.ensure_bucket()
    return found

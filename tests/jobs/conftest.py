"""One real redis-server for the room's tests; each test starts with an empty one."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from jobs.client import RedisClient, connect
from jobs.outbox import Outbox
from jobs.settings import Settings
from jobs.store import JobStore
from tests.support.redis import RedisServer, redis_server

MakeStore = Callable[..., JobStore]


@pytest.fixture(scope="session")
def server() -> Iterator[RedisServer]:
    with redis_server() as running:
        yield running


@pytest.fixture
def redis(server: RedisServer) -> Iterator[RedisClient]:
    client = connect(Settings(redis_url=server.url))
    client.execute_command("FLUSHALL")
    yield client
    client.close()


@pytest.fixture
def make_store(redis: RedisClient, server: RedisServer) -> MakeStore:
    def make(**settings: Any) -> JobStore:
        return JobStore(redis, Settings(redis_url=server.url, **settings))

    return make


@pytest.fixture
def store(make_store: MakeStore) -> JobStore:
    return make_store()


@pytest.fixture
def outbox(store: JobStore) -> Outbox:
    return Outbox(store.redis, store.settings)

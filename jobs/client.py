"""The Redis client as this package uses it: how to connect, and one error for not reaching Redis."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, cast

import redis
import redis.asyncio
from redis import exceptions
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

from jobs.errors import StoreUnavailable
from jobs.settings import Settings

QUICK_SECONDS = 2.0  # the longest wait, for a connection and for a reply, of quick clients of Redis and S3

# Replies that mean "not now", not "wrong command": a replica after a failover, loading, out of memory, ...
_NOT_NOW = (
    "READONLY",
    "LOADING",
    "MASTERDOWN",
    "CLUSTERDOWN",
    "MISCONF",
    "NOREPLICAS",
    "maxmemory",
    "BUSY",
    "UNKILLABLE",
)


class RedisClient(Protocol):
    """The little of ``redis.Redis`` that is used, so that its type stubs don't matter."""

    def execute_command(self, *args: Any, **options: Any) -> Any:
        """Send one command and return its reply."""
        ...

    def pipeline(self, transaction: bool = True) -> Any:
        """Several commands in one round trip."""
        ...

    def client(self) -> Any:
        """A client that keeps to one connection."""
        ...

    def ping(self, **options: Any) -> Any:
        """Raise a redis error unless the server answers."""
        ...

    def close(self) -> None:
        """Drop the connections."""
        ...


class AsyncRedisClient(Protocol):
    """The same of ``redis.asyncio.Redis``."""

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        """Send one command and return its reply."""
        ...

    async def aclose(self) -> None:
        """Drop the connections."""
        ...


@contextmanager
def guard() -> Iterator[None]:
    """Turn connection errors, timeouts and "not now" replies into StoreUnavailable; let other errors pass."""
    try:
        yield
    except (exceptions.ConnectionError, exceptions.TimeoutError, exceptions.ReadOnlyError) as error:
        raise StoreUnavailable(f"Redis cannot be reached: {error}; try again shortly") from error
    except exceptions.ResponseError as error:
        text = str(error)
        if isinstance(error, exceptions.MasterDownError) or any(word in text[:300] for word in _NOT_NOW):
            raise StoreUnavailable(f"Redis refuses writes: {text}; try again shortly") from error
        raise


def _options(settings: Settings) -> dict[str, Any]:
    options: dict[str, Any] = {
        "socket_timeout": settings.redis_timeout,
        "socket_connect_timeout": settings.redis_timeout,
        "health_check_interval": 30,
        "decode_responses": True,
    }
    if not settings.redis_url.startswith("unix:"):
        options["socket_keepalive"] = True
    return options


def connect(settings: Settings, *, quick: bool = False) -> RedisClient:
    """A client (a ``redis.Redis``) for `settings.redis_url`. Nothing is sent yet.

    A command whose reply was lost is sent again (twice at most): every script in this package tolerates a
    repeated call. quick: never, and QUICK_SECONDS at most are waited, for a caller that looks again itself.
    """
    retry = Retry(ExponentialBackoff(cap=0.5, base=0.05), 0 if quick else 2)
    if quick:
        shorter = min(QUICK_SECONDS, settings.redis_timeout)
        settings = settings.model_copy(update={"redis_timeout": shorter})
    client: RedisClient = redis.Redis.from_url(settings.redis_url, retry=retry, **_options(settings))
    return client


def connect_async(settings: Settings) -> AsyncRedisClient:
    """The asyncio client (a ``redis.asyncio.Redis``), for long reads of event streams."""
    retry = AsyncRetry(ExponentialBackoff(cap=0.5, base=0.05), 2)
    client: Any = redis.asyncio.Redis.from_url(settings.redis_url, retry=retry, **_options(settings))
    return cast(AsyncRedisClient, client)


def redis_now(client: RedisClient) -> float:
    """Unix seconds by Redis' own clock: every host sees the same. Raises redis errors; use within `guard`."""
    whole, micros = client.execute_command("TIME")
    return int(whole) + int(micros) / 1e6


def require_text(client: object) -> None:
    """Refuse a client that returns bytes.

    Raises ValueError naming the fix.
    """
    pool = getattr(client, "connection_pool", None)
    if not getattr(pool, "connection_kwargs", {}).get("decode_responses"):
        raise ValueError(
            "got a Redis client that returns bytes, expected decode_responses=True; use jobs.client.connect"
        )

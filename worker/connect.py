"""Connections of the worker roles, and the one clear line when a service can't be reached at start."""

from contextlib import closing

import redis

from jobs.client import connect
from jobs.errors import StorageUnavailable
from jobs.settings import Settings
from jobs.storage import ObjectStore
from jobs.store import JobStore


class Unreachable(Exception):
    """A service did not answer at start; the message is one line for the operator."""


def open_store(settings: Settings) -> JobStore:
    """The job store over a client of its own."""
    return JobStore(connect(settings), settings)


def check_redis(settings: Settings) -> None:
    """Raise Unreachable when Redis does not answer a PING."""
    try:
        with closing(connect(settings)) as client:
            client.execute_command("PING")
    except (redis.RedisError, OSError) as error:
        where = settings.redis_url.rsplit("@", 1)[-1]  # without a password
        raise Unreachable(f"Redis at {where} can't be reached ({error}); set REEL_REDIS_URL") from None


def check_storage(settings: Settings) -> None:
    """Raise Unreachable when the bucket can neither be found nor made."""
    try:
        ObjectStore(settings).ensure_bucket()
    except (StorageUnavailable, OSError) as error:
        raise Unreachable(f"S3 can't be used: {error}") from None

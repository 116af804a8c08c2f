"""Connections of the worker roles, and the one clear line when a service can't be reached at start."""

import logging
from contextlib import closing

import redis

from jobs.client import connect
from jobs.errors import StorageUnavailable
from jobs.settings import Settings
from jobs.storage import ObjectStore
from jobs.store import JobStore

log = logging.getLogger(__name__)


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
    store = ObjectStore(settings)
    try:
        if not store.ready():
            store.ensure_bucket()
    except (StorageUnavailable, OSError) as error:
        raise Unreachable(f"S3 can't be used: {error}") from None


def prepare_bucket(settings: Settings) -> None:
    """Make the bucket and its CORS rules where S3 is ours; at AWS they are the operator's. Never raises."""
    if settings.s3_endpoint is None:
        return
    try:
        ObjectStore(settings).ensure_bucket()
    except (StorageUnavailable, OSError) as error:
        log.warning("the bucket can't be made now: %s", error)

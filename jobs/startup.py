"""What a starting role needs: Redis, S3 and the bucket. Parts of a deployment start side by side, so each
waits a while for the others (`start_seconds`), then says in one line what is missing.
"""

import logging
import sys
import time
from collections.abc import Callable
from contextlib import closing

import redis

from jobs.client import connect, guard
from jobs.errors import StorageRefused, StorageUnavailable, StoreUnavailable
from jobs.settings import Settings
from jobs.storage import ObjectStore

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.5  # between two looks


class Missing(Exception):
    """A service can't be used; the message is one line for the operator."""


def redis_missing(settings: Settings) -> str | None:
    """What is wrong with Redis, None when it takes commands."""
    where = settings.redis_url.rsplit("@", 1)[-1]  # without a password
    try:
        with closing(connect(settings, quick=True)) as client, guard():
            client.ping()
    except (StoreUnavailable, redis.RedisError, OSError) as error:
        why = _short(error.__cause__ or error)
        return f"Redis at {where} cannot be reached ({why}); check REEL_REDIS_URL"
    return None


def storage_missing(settings: Settings) -> str | None:
    """What is wrong with S3 or the bucket, None when the bucket answers."""
    try:
        if not ObjectStore(settings, quick=True).ready():
            return f"S3 has no bucket {settings.s3_bucket!r}; make it, or check REEL_S3_BUCKET"
    except (StorageUnavailable, OSError) as error:
        return f"S3 cannot be used: {_short(error)}"
    return None


def made_bucket_missing(settings: Settings) -> str | None:
    """The same, but a missing bucket is made, with its CORS rules; not at AWS, where it is the operator's.

    Rules that the storage refuses are the operator's as well; rules that it failed to take are still missing.
    """
    if settings.s3_endpoint is None:
        return storage_missing(settings)
    try:
        ObjectStore(settings, quick=True).ensure_bucket()
    except (StorageUnavailable, OSError) as error:
        if not isinstance(error, StorageRefused) or storage_missing(settings):
            return f"S3 cannot be used: {_short(error)}"
        log.warning("the bucket is there, its CORS rules are not ours to set: %s", _short(error))
    return None


def wait_for(settings: Settings, role: str, *looks: Callable[[Settings], str | None]) -> None:
    """Until every look finds nothing missing. Standard error hears once what the role waits for.

    Raises Missing with what is still missing after `settings.start_seconds`, within one look's time more.
    """
    end = time.monotonic() + settings.start_seconds
    said = False
    for look in looks:
        while line := look(settings):
            if time.monotonic() >= end:
                raise Missing(line)
            if not said:
                print(
                    f"reel {role}: waiting up to {settings.start_seconds:g} s: {line}",
                    file=sys.stderr,
                    flush=True,
                )
                said = True
            time.sleep(LOOK_SECONDS)


def _short(error: BaseException) -> str:
    """The error's text on one line."""
    return " ".join(str(error).split())[:300]

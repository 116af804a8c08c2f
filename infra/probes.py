"""Questions that a starting stack asks its parts: each answers with a bool and never waits long."""

import contextlib
import http.client
import urllib.request
from collections.abc import Collection
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from infra.ports import is_free

if TYPE_CHECKING:
    from jobs.settings import Settings
    from jobs.storage import ObjectStore


def redis_answers(settings: "Settings") -> bool:
    """Whether Redis takes commands (it refuses while it loads its data)."""
    import redis

    from jobs.client import connect

    with contextlib.closing(connect(settings)) as client:
        try:
            return bool(client.ping())
        except redis.RedisError:
            return False


def s3_takes_writes(store: "ObjectStore") -> bool:
    """Whether an object can be stored: the gateway listens seconds before a volume is writable."""
    from jobs.errors import StorageUnavailable

    endpoint = store.settings.s3_endpoint
    if endpoint is not None and is_free(
        urlsplit(endpoint).port or 80
    ):  # nobody listens yet: don't wait for retries
        return False
    try:
        store.ensure_bucket()
        store.put_bytes("probe/ready", b"1", "text/plain")
    except StorageUnavailable:
        return False
    return True


def nodes_live(settings: "Settings", wanted: Collection[str], since: float) -> bool:
    """Whether all `wanted` nodes take jobs and registered after `since`, Unix seconds.

    The time tells them from the entries of a stack that was killed.
    """
    from jobs.client import connect
    from jobs.errors import StoreUnavailable
    from jobs.nodes import NodeRegistry

    try:
        with contextlib.closing(connect(settings)) as client:
            nodes = NodeRegistry(client).list()
    except StoreUnavailable:
        return False
    live = {node.id for node in nodes if node.started_at >= since and node.state in ("idle", "busy")}
    return live.issuperset(wanted)


def http_ok(url: str) -> bool:
    """Whether a GET without a key is answered with 200."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(url, timeout=5) as response:
            return bool(response.status == 200)
    except (OSError, http.client.HTTPException):
        return False

"""Waiting for job events: one blocking read serves all open streams and waits of this process.

A connection to Redis per open stream would let a few hundred watchers use up Redis' connections. Here one
task reads all watched streams at once and only wakes those who wait; each then reads its own stream.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import structlog
from redis.exceptions import RedisError

from jobs.client import AsyncRedisClient
from jobs.events import START, Event, read_events_async
from jobs.scripts import PREFIX

log = structlog.get_logger("api")
BLOCK_MS = 200  # a stream that joins while the hub's read is blocked waits at most this long
BATCH = 200  # events read at once by one watcher


class Subscription:
    """One watcher of one job."""

    def __init__(self, client: AsyncRedisClient, job_id: str) -> None:
        self._client = client
        self._job_id = job_id
        self.wake = asyncio.Event()

    async def read(self, after: str, timeout: float) -> list[Event]:
        """Events after the id `after`, oldest first; empty when none came within `timeout` seconds.

        Raises StoreUnavailable.
        """
        self.wake.clear()  # before the read: what comes during it wakes the wait below
        events = await self._now(after)
        if events or timeout <= 0:
            return events
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.wake.wait(), timeout)
        return await self._now(after)

    async def _now(self, after: str) -> list[Event]:
        return await read_events_async(self._client, self._job_id, after, count=BATCH)


class Watcher:
    """Wakes subscriptions when their stream grows."""

    def __init__(self, client: AsyncRedisClient) -> None:
        self._client = client
        self._waiting: dict[str, set[Subscription]] = {}
        self._seen: dict[str, str] = {}  # stream key to the last id that the hub has read
        self._joined = asyncio.Event()

    @contextlib.asynccontextmanager
    async def subscribe(self, job_id: str, after: str = START) -> AsyncIterator[Subscription]:
        """Watch a job's events while the block runs."""
        key = f"{PREFIX}events:{job_id}"
        subscription = Subscription(self._client, job_id)
        self._waiting.setdefault(key, set()).add(subscription)
        self._seen.setdefault(key, after)
        self._joined.set()
        try:
            yield subscription
        finally:
            self._waiting[key].discard(subscription)
            if not self._waiting[key]:
                del self._waiting[key], self._seen[key]

    def wake_all(self) -> None:
        """Let every wait return now, at shutdown."""
        for group in self._waiting.values():
            for subscription in group:
                subscription.wake.set()

    async def run(self) -> None:
        """The hub: reads until canceled; survives a Redis that is away."""
        while True:
            if not self._seen:
                self._joined.clear()
                await self._joined.wait()
            try:
                keys, ids = list(self._seen), list(self._seen.values())
                reply: Any = await self._client.execute_command(
                    "XREAD", "COUNT", BATCH, "BLOCK", BLOCK_MS, "STREAMS", *keys, *ids
                )
            except RedisError as error:
                log.warning("event_hub_waits_for_redis", error=type(error).__name__)
                await asyncio.sleep(0.5)
                continue
            for key, entries in reply or []:
                self._notice(str(key), str(entries[-1][0]))

    def _notice(self, key: str, last: str) -> None:
        if key in self._seen:
            self._seen[key] = last
            for subscription in self._waiting.get(key, ()):
                subscription.wake.set()

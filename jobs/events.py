"""Reading a job's event stream, sync and async. The scripts write it; nothing else does.

A job that waits for its first start has no stream: its ``job.queued`` is made up here from the record, under
the id that the script will give it when it writes the first real event.
"""

import json
from dataclasses import dataclass
from typing import Any

from jobs.client import AsyncRedisClient, RedisClient, guard
from jobs.scripts import PREFIX

START = "0"  # `after` this id: everything that the stream still holds


@dataclass(frozen=True)
class Event:
    """One entry: `id` resumes (Last-Event-ID), `type` as in ``job.started``, `data` the state then."""

    id: str
    type: str
    data: dict[str, Any]


def read_events(
    redis: RedisClient, job_id: str, after: str = START, block_ms: int = 0, count: int = 100
) -> list[Event]:
    """Events after id `after`, waiting up to `block_ms` milliseconds (0: don't wait) for the first.

    Keep block_ms under the client's socket timeout. An empty list: nothing came, or the job is gone.
    """
    with guard():
        if after == START:
            found = _parse(redis.execute_command(*_read(job_id, after, 0, count)))
            first = _first(redis.execute_command(*_record(job_id)), job_id) if not found else []
            if found or first:
                return found or first
        return _parse(redis.execute_command(*_read(job_id, after, block_ms, count)))


async def read_events_async(
    redis: AsyncRedisClient, job_id: str, after: str = START, block_ms: int = 0, count: int = 100
) -> list[Event]:
    """The same for asyncio: holds one pooled connection while it waits."""
    with guard():
        if after == START:
            found = _parse(await redis.execute_command(*_read(job_id, after, 0, count)))
            first = _first(await redis.execute_command(*_record(job_id)), job_id) if not found else []
            if found or first:
                return found or first
        return _parse(await redis.execute_command(*_read(job_id, after, block_ms, count)))


def last_event_id(redis: RedisClient, job_id: str) -> str:
    """The newest event's id, or START when there is none."""
    with guard():
        newest = redis.execute_command("XREVRANGE", f"{PREFIX}events:{job_id}", "+", "-", "COUNT", 1)
        if newest:
            return str(newest[0][0])
        first = _first(redis.execute_command(*_record(job_id)), job_id)
    return first[0].id if first else START


def valid_event_id(text: str) -> bool:
    """Whether a client's Last-Event-ID can be used as `after`."""
    parts = text.split("-")
    return len(parts) <= 2 and all(part.isascii() and part.isdigit() and len(part) < 20 for part in parts)


def _read(job_id: str, after: str, block_ms: int, count: int) -> list[str | int]:
    block: list[str | int] = ["BLOCK", block_ms] if block_ms > 0 else []
    return ["XREAD", "COUNT", count, *block, "STREAMS", f"{PREFIX}events:{job_id}", after]


def _record(job_id: str) -> list[str]:
    return ["HMGET", f"{PREFIX}job:{job_id}", "state", "created_at", "model"]


def _first(record: list[str | None], job_id: str) -> list[Event]:
    """The ``job.queued`` of a job that never started; the same as the scripts' `append` writes."""
    state, created_at, model = record
    if state != "queued" or created_at is None:
        return []
    data = {
        "id": job_id,
        "state": "queued",
        "model": model,
        "attempts": 0,
        "phase": None,
        "step": 0,
        "progress": 0,
        "eta_seconds": None,
        "cancel_requested": False,
        "version": 1,
        "error": None,
        "reason": None,
    }
    whole, _, micros = created_at.partition(".")
    return [Event(f"{whole}{micros[:3]}-0", "job.queued", data)]


def _parse(reply: Any) -> list[Event]:
    if not reply:
        return []
    streams = list(reply.values()) if isinstance(reply, dict) else [entries for _, entries in reply]
    entries = streams[0]
    if entries and isinstance(entries[0], list) and entries[0] and isinstance(entries[0][0], (list, tuple)):
        entries = entries[0]  # RESP3 nests once more
    return [Event(event_id, fields["type"], json.loads(fields["data"])) for event_id, fields in entries]

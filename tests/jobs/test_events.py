"""A job's event stream, as SSE readers see it."""

import asyncio
import threading
import time

import pytest

from jobs.client import connect_async
from jobs.events import START, Event, last_event_id, read_events, read_events_async, valid_event_id
from jobs.job import JobError
from jobs.scripts import EVENTS_CAP
from jobs.store import JobStore
from tests.support.jobs import new_job, result


def types(events: list[Event]) -> list[str]:
    return [event.type for event in events]


def claim(store: JobStore) -> int:
    job = store.claim("tiny", "node")
    assert job is not None
    return job.token


def test_a_job_s_life(store: JobStore) -> None:
    job, _ = store.submit(new_job())
    token = claim(store)
    store.heartbeat(job.id, token, phase="denoising", step=2, progress=0.5, eta_seconds=1.25)
    store.heartbeat(job.id, token, phase="denoising", step=2, progress=0.5, eta_seconds=1.2)  # nothing new
    store.give_back(job.id, token)
    store.finish(job.id, claim(store), result())
    events = read_events(store.redis, job.id)
    assert types(events) == [
        "job.queued",
        "job.started",
        "job.progress",
        "job.queued",
        "job.started",
        "job.succeeded",
    ]
    progress = events[2].data
    assert (progress["phase"], progress["step"], progress["progress"], progress["eta_seconds"]) == (
        "denoising",
        2,
        0.5,
        1.25,
    )
    assert events[-1].data["state"] == "succeeded"
    assert events[-1].data["progress"] == 1
    versions = [event.data["version"] for event in events]
    assert versions == sorted(set(versions))
    assert last_event_id(store.redis, job.id) == events[-1].id


@pytest.mark.parametrize(("said", "shown"), [(-0.5, 0), (1.5, 1)])
def test_progress_stays_between_0_and_1(store: JobStore, said: float, shown: float) -> None:
    job, _ = store.submit(new_job())
    store.heartbeat(job.id, claim(store), phase="denoising", step=1, progress=said)
    assert store.get(job.id).progress == shown


def test_a_failed_attempt_says_why_and_a_wish_to_cancel_is_told_once(store: JobStore) -> None:
    job, _ = store.submit(new_job())
    store.fail(job.id, claim(store), JobError(type="boom", title="Boom", detail="it broke"))
    token = claim(store)
    for _ in range(2):
        store.cancel(job.id)
    store.cancel_running(job.id, token)
    _, _, again, _, asked, ended = read_events(store.redis, job.id)
    assert (again.type, again.data["reason"]["detail"], again.data["error"]) == (
        "job.queued",
        "it broke",
        None,
    )
    assert (asked.type, asked.data["state"], asked.data["cancel_requested"]) == (
        "job.cancel_requested",
        "running",
        True,
    )
    assert (ended.type, ended.data["state"]) == ("job.canceled", "canceled")


def test_a_waiting_job_s_first_event_is_the_one_written_later(store: JobStore) -> None:
    job, _ = store.submit(new_job())
    made_up = read_events(store.redis, job.id)
    assert types(made_up) == ["job.queued"]
    assert store.redis.execute_command("EXISTS", f"reel:events:{job.id}") == 0
    assert last_event_id(store.redis, job.id) == made_up[0].id
    store.claim("tiny", "node")
    assert read_events(store.redis, job.id)[0] == made_up[0]
    assert types(read_events(store.redis, job.id, made_up[0].id)) == ["job.started"]


def test_reading_resumes_after_an_id_and_waits(store: JobStore) -> None:
    job, _ = store.submit(new_job())
    first = read_events(store.redis, job.id)[0]
    assert read_events(store.redis, job.id, first.id) == []
    timer = threading.Timer(0.1, lambda: store.cancel(job.id))
    timer.start()
    start = time.monotonic()
    found = read_events(store.redis, job.id, first.id, block_ms=3000)
    timer.join()
    assert types(found) == ["job.canceled"]
    assert time.monotonic() - start < 2


def test_no_such_job_has_no_events(store: JobStore) -> None:
    assert read_events(store.redis, "job_nowhere", block_ms=10) == []
    assert last_event_id(store.redis, "job_nowhere") == START


async def test_async_readers_share_nothing_with_each_other(store: JobStore) -> None:
    client = connect_async(store.settings)
    try:
        job, _ = await asyncio.to_thread(store.submit, new_job())
        first = await read_events_async(client, job.id)
        waiting = [
            asyncio.create_task(read_events_async(client, job.id, first[0].id, block_ms=3000))
            for _ in range(5)
        ]
        await asyncio.sleep(0.05)
        await asyncio.to_thread(store.cancel, job.id)
        assert [types(await task) for task in waiting] == [["job.canceled"]] * 5
        assert await read_events_async(client, "job_nowhere") == []
    finally:
        await client.aclose()


def test_the_stream_is_capped(store: JobStore) -> None:
    job, _ = store.submit(new_job())
    token = claim(store)
    for step in range(EVENTS_CAP + 300):
        store.heartbeat(job.id, token, phase="denoising", step=step, progress=0)
    assert store.redis.execute_command("XLEN", f"reel:events:{job.id}") <= EVENTS_CAP + 100


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("0", True),
        ("12-3", True),
        ("", False),
        ("a", False),
        ("1-2-3", False),
        ("-1", False),
        ("9" * 30, False),
    ],
)
def test_event_ids_from_clients(store: JobStore, text: str, good: bool) -> None:
    assert valid_event_id(text) == good
    if good:
        read_events(store.redis, "job_x", text)

"""Server-sent events: complete, in order, resumable, alive through silence, and gone when nobody listens."""

import contextlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from httpx_sse import ServerSentEvent, connect_sse

from api.routes import events as events_route
from jobs.job import FailureClass, JobError, JobState, Phase
from jobs.settings import Settings
from jobs.store import JobStore
from tests.api.conftest import MODEL, Running, finish, serve, submit
from tests.support.proxy import Proxy


@contextmanager
def stream(client: httpx.Client, job_id: str, **headers: str) -> Iterator[Iterator[ServerSentEvent]]:
    with connect_sse(client, "GET", f"/v1/jobs/{job_id}/events", headers=headers) as source:
        assert source.response.headers["content-type"].startswith("text/event-stream")
        assert source.response.headers["x-accel-buffering"] == "no"
        assert "no-store" in source.response.headers["cache-control"]
        yield source.iter_sse()


def run(store: JobStore, settings: Settings, steps: int = 3) -> None:
    """A whole job, as a node would run it."""
    job = store.claim(MODEL, "node-a")
    assert job is not None
    for step in range(1, steps + 1):
        store.heartbeat(job.id, job.token, phase=Phase.DENOISING, step=step, progress=step / (steps + 1))
        time.sleep(0.05)
    store.give_back(job.id, job.token)
    finish(store, settings)


def test_a_whole_job_live(client: httpx.Client, store: JobStore, settings: Settings) -> None:
    job_id = str(submit(client)["id"])
    worker = threading.Thread(target=run, args=(store, settings))
    seen: list[ServerSentEvent] = []
    with stream(client, job_id) as events:
        first = next(events)
        assert first.event == "job.queued"
        worker.start()
        seen = [first, *events]  # ends by itself
    worker.join()
    types = [event.event for event in seen]
    assert types == [
        "job.queued",
        "job.started",
        *["job.progress"] * 3,
        "job.queued",
        "job.started",
        "job.succeeded",
    ]
    progress = [event.json()["progress"] for event in seen if event.event == "job.progress"]
    assert progress == sorted(progress)
    assert all(event.json()["id"] == job_id for event in seen)
    versions = [event.json()["version"] for event in seen]
    assert versions == sorted(versions)
    assert len({event.id for event in seen}) == len(seen)


def test_resume_anywhere(client: httpx.Client, store: JobStore, settings: Settings) -> None:
    """From each event on, the rest comes: nothing twice, nothing lost; after the last, 204."""
    job_id = str(submit(client)["id"])
    run(store, settings)
    with stream(client, job_id) as events:
        whole = [(event.id, event.event, event.data) for event in events]
    for position in range(len(whole) - 1):
        with stream(client, job_id, **{"Last-Event-ID": whole[position][0]}) as events:
            assert [(event.id, event.event, event.data) for event in events] == whole[position + 1 :]
    over = client.get(f"/v1/jobs/{job_id}/events", headers={"Last-Event-ID": whole[-1][0]})
    assert over.status_code == 204
    by_query = client.get(f"/v1/jobs/{job_id}/events", params={"after": whole[-2][0]})
    assert by_query.text.count("event: ") == 1
    # EventSource repeats the URL that it was opened with: what it has seen since is in the header.
    url, header = f"/v1/jobs/{job_id}/events?after={whole[0][0]}", {"Last-Event-ID": whole[-2][0]}
    assert client.get(url, headers=header).text.count("event: ") == 1


def test_reconnect_after_a_cut(client: httpx.Client, store: JobStore, settings: Settings) -> None:
    job_id = str(submit(client)["id"])
    with stream(client, job_id) as events:
        last = next(events).id
    run(store, settings)  # while nobody listens
    with stream(client, job_id, **{"Last-Event-ID": last}) as events:
        types = [event.event for event in events]
    assert types[0] == "job.started"
    assert types[-1] == "job.succeeded"


def test_heartbeats_keep_a_silent_stream_alive(client: httpx.Client) -> None:
    job_id = submit(client)["id"]
    with client.stream("GET", f"/v1/jobs/{job_id}/events") as answer:
        lines = answer.iter_lines()
        beats = 0
        while beats < 3:
            beats += next(lines) == ": heartbeat"


@pytest.mark.parametrize(("heartbeat", "survives"), [(0.3, True), (60.0, False)])
def test_a_proxy_that_cuts_idle_connections(
    settings: Settings, client_for: Any, store: JobStore, heartbeat: float, survives: bool
) -> None:
    """One second of silence and the proxy hangs up: the heartbeats carry a waiting job's stream over it."""
    with serve(settings.model_copy(update={"heartbeat_seconds": heartbeat})) as found:
        proxy = Proxy(("127.0.0.1", int(found.url.rsplit(":", 1)[1])), idle_seconds=1.0)
        try:
            client = client_for(url=f"http://127.0.0.1:{proxy.port}")
            job_id = str(submit(client)["id"])
            worker = threading.Timer(2.5, lambda: finish(store, settings))
            worker.start()
            types: list[str] = []
            with contextlib.suppress(httpx.RemoteProtocolError), stream(client, job_id) as events:
                for event in events:
                    types.append(event.event)
            worker.join()
        finally:
            proxy.close()
    assert types[0] == "job.queued"
    assert (types[-1] == "job.succeeded") is survives


def test_an_end_between_read_and_look_is_told(
    client: httpx.Client, store: JobStore, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job ends after the stream found nothing new and before it looks whether the job is over."""
    job_id = str(submit(client)["id"])
    look = events_route._over

    def late_look(*args: Any) -> bool:
        if not store.get(job_id).terminal:
            run(store, settings)
        return look(*args)

    monkeypatch.setattr(events_route, "_over", late_look)
    with stream(client, job_id) as events:
        assert [event.event for event in events][-1] == "job.succeeded"


def test_a_stream_from_a_later_event_than_any_ends_with_the_job(
    client: httpx.Client, store: JobStore, settings: Settings
) -> None:
    """A client's mistake, which must not keep a connection for ever: also when the job fails."""
    job_id = str(submit(client)["id"])
    with stream(client, job_id, **{"Last-Event-ID": "9999999999999-0"}) as events:
        job = store.claim(MODEL, "node-a")
        assert job is not None
        error = JobError(type="user", title="No", detail="", failure_class=FailureClass.USER)
        assert store.fail(job.id, job.token, error).state is JobState.FAILED
        assert list(events) == []


def test_a_deleted_job_ends_its_stream(client: httpx.Client, store: JobStore) -> None:
    job_id = str(submit(client)["id"])
    with stream(client, job_id) as events:
        assert next(events).event == "job.queued"
        client.post(f"/v1/jobs/{job_id}/cancel")
        assert [event.event for event in events] == ["job.canceled"]
    client.delete(f"/v1/jobs/{job_id}")
    assert client.get(f"/v1/jobs/{job_id}/events").status_code == 404


@pytest.mark.parametrize("bad", ["x", "1-2-3", "-1", "$", "9" * 40])
def test_wrong_last_event_id(client: httpx.Client, bad: str) -> None:
    job_id = submit(client)["id"]
    answer = client.get(f"/v1/jobs/{job_id}/events", headers={"Last-Event-ID": bad})
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["field"] == "Last-Event-ID"


def test_many_streams_share_one_reader(client: httpx.Client, store: JobStore, settings: Settings) -> None:
    """40 streams of one job: all see all; and they leave nothing behind."""
    job_id = str(submit(client)["id"])
    counts: list[int] = []
    ready = threading.Barrier(41)

    def listen() -> None:
        own = httpx.Client(base_url=client.base_url, headers=client.headers, timeout=60)
        with own, stream(own, job_id) as events:
            next(events)
            ready.wait()
            counts.append(1 + len(list(events)))

    threads = [threading.Thread(target=listen) for _ in range(40)]
    for thread in threads:
        thread.start()
    ready.wait()
    run(store, settings)
    for thread in threads:
        thread.join()
    assert set(counts) == {8}


def test_streams_end_when_the_server_stops(settings: Settings, client_for: Any, store: JobStore) -> None:
    slow = settings.model_copy(update={"heartbeat_seconds": 60.0})
    opened = threading.Event()
    ended: list[float] = []

    def listen(url: str) -> None:
        client = client_for(url=url)
        with stream(client, str(submit(client)["id"])) as events:
            next(events)
            opened.set()
            list(events)
            ended.append(time.monotonic())

    with serve(slow) as other:
        thread = threading.Thread(target=listen, args=(other.url,))
        thread.start()
        assert opened.wait(20)
        stopped = time.monotonic()
    thread.join()
    assert ended[0] - stopped < 3


def test_open_streams_are_counted(running: Running, client: httpx.Client) -> None:
    job_id = str(submit(client)["id"])
    with stream(client, job_id) as events:
        next(events)
        assert "reel_event_streams 1.0" in client.get("/metrics").text
    end = time.monotonic() + 10
    while "reel_event_streams 0.0" not in client.get("/metrics").text:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert running.services.watcher._waiting == {}

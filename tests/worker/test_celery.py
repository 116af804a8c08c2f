"""Celery as we run it: it refuses what isn't JSON, and losing its messages loses nothing."""

import base64
import json
import pickle
import signal
import ssl
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from threading import Event, Semaphore

import pytest

from jobs.client import connect
from jobs.errors import StoreUnavailable
from jobs.ids import new_id
from jobs.job import JobState, NewJob, WebhookEvent
from jobs.keys import KeyStore
from jobs.outbox import Outbox
from jobs.settings import Settings
from jobs.store import JobStore
from tests.support.jobs import result, video_request
from tests.support.node import environment, until
from tests.support.tls import self_signed
from tests.worker.conftest import SECRET_KEY
from tests.worker.receiver import RawReceiver, Reply
from worker import celery_app
from worker.celery_app import (
    PREFIX,
    SENDERS,
    THREADS,
    VISIBILITY_SECONDS,
    bounded,
    broker_url,
    make_app,
    schedule,
)

CODE = "from worker.serve import run_celery; from jobs.settings import get_settings; "


@contextmanager
def celery(settings: Settings, role: str, log: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """`reel celery ROLE` in a process."""
    with log.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, "-c", CODE + f"raise SystemExit(run_celery(get_settings(), {role!r}))"],
            env=environment(settings), stdout=out, stderr=out,
        )  # fmt: skip
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        finally:
            process.kill()
            process.wait()


def finished_job(settings: Settings, store: JobStore, url: str) -> str:
    """A succeeded job with one webhook due."""
    key, _, _ = KeyStore(connect(settings), SECRET_KEY).create("test")
    new = NewJob(
        id=new_id("job"), key_id=key.id, request=video_request(), callback_url=url,
        webhook_events=(WebhookEvent.SUCCEEDED,),
    )  # fmt: skip
    store.submit(new)
    job = store.claim("tiny", "node-a")
    assert job is not None
    store.finish(job.id, job.token, result(job.id, job.token))
    return job.id


class Bomb:
    """Touches a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, (f"open({str(self.path)!r}, 'w').close()",))


def inject_pickle(settings: Settings, path: Path) -> None:
    """Put a message into the queue as kombu would, with a pickled body."""
    body = base64.b64encode(pickle.dumps(((Bomb(path),), {}, {}))).decode()
    message = {
        "body": body,
        "content-encoding": "binary",
        "content-type": "application/x-python-serialize",
        "headers": {"lang": "py", "task": "reel.deliver", "id": "evil", "argsrepr": "", "kwargsrepr": ""},
        "properties": {
            "correlation_id": "evil", "delivery_mode": 2, "delivery_tag": "evil", "body_encoding": "base64",
            "delivery_info": {"exchange": "", "routing_key": "reel"}, "priority": 0,
        },
    }  # fmt: skip
    connect(settings).lpush(f"{PREFIX}reel", json.dumps(message))


def test_pickle_is_refused_lost_messages_are_found_again_and_stop_is_clean(
    settings: Settings, store: JobStore, tmp_path: Path
) -> None:
    redis = connect(settings)
    bomb, log = tmp_path / "exploded", tmp_path / "celery.log"
    with RawReceiver() as receiver:
        job_id = finished_job(settings, store, f"http://127.0.0.1:{receiver.port}/")
        app = make_app(settings)
        assert app.tasks["reel.dispatch"]() == 1
        assert redis.llen(f"{PREFIX}reel") == 1
        redis.delete(f"{PREFIX}reel")  # the message is lost; the outbox still knows
        inject_pickle(settings, bomb)
        with celery(settings, "all", log) as process:
            receiver.wait(1, 45)
            until(lambda: redis.llen(f"{PREFIX}reel") == 0, 10, "an empty queue")
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
    text = log.read_text()
    assert "ContentDisallowed" in text, text
    assert not bomb.exists()
    (delivery,) = Outbox(redis, settings).for_job(job_id)
    assert (delivery.state, delivery.attempts) == ("delivered", 1)
    app.close()


def test_a_backlog_makes_no_heap_of_messages_and_one_message_sends_all_that_is_due(
    settings: Settings, store: JobStore
) -> None:
    """Found by chaos: a message per delivery, sent again while it waited, grew until all of them expired."""
    redis = connect(settings)
    app = make_app(settings)
    with RawReceiver() as receiver:
        for _ in range(2 * SENDERS):
            finished_job(settings, store, f"http://127.0.0.1:{receiver.port}/")
        for _ in range(20):
            app.tasks["reel.dispatch"]()
        assert redis.llen(f"{PREFIX}reel") <= 2 * SENDERS
        app.tasks["reel.deliver"]()
        assert len(receiver.received) == 2 * SENDERS
    assert Outbox(redis, settings).pending() == 0
    app.close()


def test_hanging_receivers_leave_threads_to_the_sweep(settings: Settings, store: JobStore) -> None:
    app = make_app(settings)
    with RawReceiver(Reply(delay=2.0)) as receiver, ThreadPoolExecutor(THREADS) as pool:
        for _ in range(THREADS):
            finished_job(settings, store, f"http://127.0.0.1:{receiver.port}/")
        calls = [pool.submit(app.tasks["reel.deliver"]) for _ in range(THREADS)]
        until(lambda: sum(call.done() for call in calls) >= THREADS - SENDERS, 1.5, "free threads")
        assert sum(call.done() for call in calls) == THREADS - SENDERS
    assert Outbox(connect(settings), settings).pending() == 0
    app.close()


def test_the_sweep_gives_a_dead_nodes_job_another_try(settings: Settings, store: JobStore) -> None:
    short = settings.model_copy(update={"lease_seconds": 0.05})
    app, quick = make_app(short), JobStore(connect(short), short)
    store.submit(NewJob(id=new_id("job"), key_id="key_a", request=video_request()))
    job = quick.claim("tiny", "node-a")
    assert job is not None
    until(lambda: app.tasks["reel.sweep"]() == 1, 5, "the sweep")
    again = store.get(job.id)
    assert (again.state, again.attempts) == (JobState.QUEUED, 1)
    app.close()


def test_one_clean_and_one_sweep_at_a_time(
    settings: Settings, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow storage had all threads clean the same hundred prefixes, and none was left to sweep."""
    started, go_on = Semaphore(0), Event()

    def slow(*_: object) -> int:
        started.release()
        go_on.wait(10)
        return 1

    for task, call in (("reel.clean", "remove_files"), ("reel.sweep", "sweep")):
        monkeypatch.setattr(celery_app, call, slow)
        app = make_app(settings)
        go_on.clear()
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(app.tasks[task])
            assert started.acquire(timeout=5)
            assert app.tasks[task]() == 0
            go_on.set()
            assert first.result(5) == 1
        assert app.tasks[task]() == 1, "the next one may"
        app.close()


def test_a_task_that_fails_makes_room_for_the_next() -> None:
    """Redis away for one sweep must not be the end of all of them."""
    one = Semaphore(1)

    def away() -> int:
        raise StoreUnavailable("Redis cannot be reached")

    for _ in range(2):
        with pytest.raises(StoreUnavailable):
            bounded(one, away)
    assert bounded(one, lambda: 7) == 7


def test_a_clock_that_is_minutes_off_stops_nothing(settings: Settings) -> None:
    """Beat's clock writes when a message expires, and the worker's reads it."""
    redis, app = connect(settings), make_app(settings)
    assert {entry["task"] for entry in schedule(settings).values()} == {
        "reel.dispatch",
        "reel.sweep",
        "reel.clean",
    }
    for entry in schedule(settings).values():
        app.tasks[entry["task"]].apply_async(**entry["options"])
    for text in redis.execute_command("LRANGE", f"{PREFIX}reel", 0, -1):
        ends = datetime.fromisoformat(json.loads(text)["headers"]["expires"])
        assert (ends - datetime.now(UTC)).total_seconds() > 300
    assert redis.llen(f"{PREFIX}reel") == 3
    app.close()


def test_settings_that_matter(settings: Settings) -> None:
    app = make_app(settings)
    assert app.conf.accept_content == ["json"]
    assert app.conf.task_serializer == app.conf.result_serializer == "json"
    assert app.conf.task_acks_late
    assert app.conf.task_ignore_result
    assert app.conf.worker_prefetch_multiplier == 1
    for options in (app.conf.broker_transport_options, app.conf.result_backend_transport_options, app.conf):
        assert options["visibility_timeout"] == VISIBILITY_SECONDS
    app.close()


def test_a_broker_by_tls_has_to_prove_who_it_is(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a certificate that somebody vouches for, and that names the host of the URL."""
    certificate = self_signed("other.example", tmp_path / "cert.pem")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)
    for retries in ("redis.retry", "kombu.utils.functional"):
        monkeypatch.setattr(f"{retries}.sleep", lambda seconds: None)
    with RawReceiver(tls=tls) as impostor:
        url = f"rediss://localhost:{impostor.port}/0"
        app = make_app(settings.model_copy(update={"redis_url": url}))
        for why in ("self-signed", "Hostname mismatch"):
            with pytest.raises(Exception, match=f"CERTIFICATE_VERIFY_FAILED.*{why}"):
                app.connection_for_write(connect_timeout=5).channel()
            monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        app.close()
    assert impostor.received == []


@pytest.mark.parametrize(
    ("ours", "kombus"),
    [
        ("redis://:pw@host:6379/2", "redis://:pw@host:6379/2"),
        ("unix:///tmp/redis.sock", "redis+socket:///tmp/redis.sock"),
        ("unix:///tmp/redis.sock?db=3", "redis+socket:///tmp/redis.sock?virtual_host=3"),
    ],
)
def test_broker_urls(ours: str, kombus: str) -> None:
    assert broker_url(ours) == kombus

"""Parts of a deployment start side by side: each waits a while for the others."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from jobs import client as client_module
from jobs import storage as storage_module
from jobs.errors import StorageRefused
from jobs.settings import Settings
from jobs.startup import Missing, made_bucket_missing, redis_missing, storage_missing, wait_for
from jobs.storage import ObjectStore
from tests.support.redis import redis_server
from tests.support.s3 import S3Server, s3_server
from tests.support.serving import serving

NOWHERE = Settings(redis_url="redis://:secret@127.0.0.1:9/0", start_seconds=0)


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


def storage(s3: S3Server, bucket: str, **fields: float) -> Settings:
    return Settings(
        s3_endpoint=s3.endpoint, s3_access_key=s3.access_key, s3_secret_key=s3.secret_key, s3_bucket=bucket,
        **fields,
    )  # type: ignore[arg-type]  # fmt: skip


def test_a_role_waits_for_redis_and_says_so_once(capsys: pytest.CaptureFixture[str]) -> None:
    with redis_server() as server:
        server.stop()
        settings = Settings(redis_url=server.url, start_seconds=20)
        late = threading.Timer(1.2, server.start)
        late.start()
        began = time.monotonic()
        wait_for(settings, "api", redis_missing)
        late.join()
        assert 1.0 < time.monotonic() - began < 10
    said = capsys.readouterr().err
    assert said.startswith("reel api: waiting up to 20 s: Redis at ")
    assert said.count("\n") == 1


def test_what_stays_away_is_named_after_that_time(capsys: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()
    with pytest.raises(
        Missing, match=r"Redis at 127\.0\.0\.1:9/0 cannot be reached .*REEL_REDIS_URL"
    ) as seen:
        wait_for(NOWHERE.model_copy(update={"start_seconds": 1.0}), "node", redis_missing)
    assert "secret" not in str(seen.value) + capsys.readouterr().err
    assert 1.0 < time.monotonic() - began < 10
    with pytest.raises(Missing):
        wait_for(NOWHERE, "node", redis_missing)
    assert not capsys.readouterr().err  # nothing was waited for


def test_the_api_waits_for_the_bucket_that_celery_makes(s3: S3Server) -> None:
    settings = storage(s3, "of-the-start", start_seconds=20.0)
    assert storage_missing(settings) == "S3 has no bucket 'of-the-start'; make it, or check REEL_S3_BUCKET"
    late = threading.Timer(1.0, lambda: wait_for(settings, "celery", made_bucket_missing))
    late.start()
    wait_for(settings, "api", storage_missing)
    late.join()
    assert ObjectStore(settings).ready()


def test_a_bucket_whose_rules_are_not_ours_is_no_obstacle(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings = storage(s3, "without-rules")
    ObjectStore(settings).ensure_bucket()

    def refused(store: ObjectStore, origins: tuple[str, ...] = ()) -> None:
        raise StorageRefused("could not open the bucket: it answered AccessDenied")

    monkeypatch.setattr(ObjectStore, "ensure_bucket", refused)
    assert made_bucket_missing(settings) is None
    assert "AccessDenied" in caplog.text
    absent = made_bucket_missing(storage(s3, "nobody-made-it"))
    assert absent is not None
    assert "AccessDenied" in absent


def test_a_wrong_endpoint_is_named_with_its_setting() -> None:
    away = Settings(s3_endpoint="http://127.0.0.1:9", s3_access_key="a", s3_secret_key="b")  # type: ignore[arg-type]
    for look in (storage_missing, made_bucket_missing):
        assert "REEL_S3_ENDPOINT" in (look(away) or "")


class Fickle(BaseHTTPRequestHandler):
    """An S3 whose bucket is there; CORS rules are answered with `status` and `code`, or taken when 200."""

    status, code = 200, ""
    puts = 0

    def do_GET(self) -> None:
        self._reply(200, "<ListBucketResult><Name>b</Name></ListBucketResult>")

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        type(self).puts += 1
        self._reply(self.status, f"<Error><Code>{self.code}</Code></Error>" if self.code else "")

    def _reply(self, status: int, body: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *args: object) -> None:
        """Nothing: a failed test needs no access log."""


@contextmanager
def fickle_s3() -> Iterator[tuple[type[Fickle], Settings]]:
    handler = type("Handler", (Fickle,), {})
    with serving(ThreadingHTTPServer(("127.0.0.1", 0), handler)) as server:
        yield handler, at_port(server.server_port)


def at_port(port: int, start_seconds: float = 20.0) -> Settings:
    return Settings(
        s3_endpoint=f"http://127.0.0.1:{port}", s3_access_key="a", s3_secret_key="b",
        start_seconds=start_seconds,
    )  # type: ignore[arg-type]  # fmt: skip


def test_rules_that_a_busy_s3_did_not_take_are_set_at_a_later_look(caplog: pytest.LogCaptureFixture) -> None:
    with fickle_s3() as (s3, settings):
        s3.status, s3.code = 503, "SlowDown"
        assert "SlowDown" in (made_bucket_missing(settings) or "")
        assert s3.puts == 1  # the next look is the retry
        s3.status, s3.code = 200, ""
        assert made_bucket_missing(settings) is None
        assert s3.puts == 2
    assert not caplog.text  # they are ours


@pytest.mark.parametrize(
    ("status", "code"),
    [(403, "AccessDenied"), (501, "NotImplemented"), (405, "MethodNotAllowed"), (400, "NotImplemented")],
)
def test_a_storage_that_refuses_rules_keeps_nobody_waiting(
    status: int, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    with fickle_s3() as (s3, settings):
        s3.status, s3.code = status, code
        assert made_bucket_missing(settings) is None
    assert "not ours to set" in caplog.text
    assert code in caplog.text


@pytest.mark.parametrize("look", [storage_missing, made_bucket_missing])
def test_an_s3_that_never_answers_costs_no_more_than_the_time_to_start(
    look: Callable[[Settings], str | None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert storage_module.QUICK_SECONDS <= 2
    monkeypatch.setattr(storage_module, "QUICK_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # the kernel accepts, nobody answers
        settings = at_port(silent.getsockname()[1], start_seconds=0.5)
        began = time.monotonic()
        with pytest.raises(Missing, match="timeout"):
            wait_for(settings, "celery", look)
        assert time.monotonic() - began < 4
    assert capsys.readouterr().err.startswith("reel celery: waiting up to 0.5 s: S3 cannot be used")


def test_a_redis_that_never_answers_costs_no_more_either(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert client_module.QUICK_SECONDS <= 2
    monkeypatch.setattr(client_module, "QUICK_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        began = time.monotonic()
        with pytest.raises(Missing, match="Timeout"):
            wait_for(
                Settings(redis_url=f"redis://127.0.0.1:{port}/0", start_seconds=0.5), "node", redis_missing
            )
        assert time.monotonic() - began < 4
    assert capsys.readouterr().err.startswith("reel node: waiting up to 0.5 s: Redis at ")

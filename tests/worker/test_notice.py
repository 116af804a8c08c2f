"""Spot-interruption notices, against a server that speaks like each cloud's metadata service."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from socketserver import BaseRequestHandler, TCPServer

import pytest

import worker.notice
from tests.support.clock import set_clock
from tests.support.serving import serving
from worker.notice import Cloud, Notice

SESSION = "a session"


class Metadata(BaseHTTPRequestHandler):
    """All three services in one; `server.reclaimed` says what they answer."""

    def do_PUT(self) -> None:
        assert self.path == "/latest/api/token"
        assert self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
        self.answer(200, SESSION)

    def do_GET(self) -> None:
        reclaimed: bool = self.server.reclaimed  # type: ignore[attr-defined]
        if self.path == "/latest/meta-data/spot/instance-action":
            assert self.headers["X-aws-ec2-metadata-token"] == SESSION
            action = json.dumps({"action": "terminate", "time": "2026-11-25T12:00:00Z"})
            self.answer(200 if reclaimed else 404, action if reclaimed else "Not Found")
        elif self.path == "/computeMetadata/v1/instance/preempted":
            assert self.headers["Metadata-Flavor"] == "Google"
            self.answer(200, "TRUE" if reclaimed else "FALSE")
        elif self.path == "/metadata/instance/compute/name?api-version=2021-02-01&format=text":
            assert self.headers["Metadata"] == "true"
            self.answer(200, "fleet_3")
        else:
            assert self.path == "/metadata/scheduledevents?api-version=2020-07-01"
            assert self.headers["Metadata"] == "true"
            preempted = "Fleet_3" if reclaimed else "fleet_7"  # every machine of a scale set hears of all
            events = [("Reboot", "fleet_3"), ("Preempt", preempted)]
            self.answer(200, json.dumps({"Events": [{"EventType": e, "Resources": [r]} for e, r in events]}))

    def answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def metadata() -> Iterator[HTTPServer]:
    server = HTTPServer(("127.0.0.1", 0), Metadata)
    server.reclaimed = False  # type: ignore[attr-defined]
    with serving(server):
        yield server


@pytest.mark.parametrize("cloud", ["aws", "gcp", "azure"])
def test_each_clouds_notice(cloud: Cloud, metadata: HTTPServer) -> None:
    notice = Notice(cloud, f"http://127.0.0.1:{metadata.server_port}")
    assert not notice.given()
    metadata.reclaimed = True  # type: ignore[attr-defined]
    assert notice.given()
    called = threading.Event()
    notice.watch(called.set)
    assert called.wait(5)


class Sessions(Metadata):
    """AWS's, which remembers one session at a time; `server.valid` says which, 0 none."""

    def do_PUT(self) -> None:
        self.server.opened += 1  # type: ignore[attr-defined]
        self.server.valid = self.server.opened  # type: ignore[attr-defined]
        self.answer(200, f"session {self.server.valid}")  # type: ignore[attr-defined]

    def do_GET(self) -> None:
        known = self.headers["X-aws-ec2-metadata-token"] == f"session {self.server.valid}"  # type: ignore[attr-defined]
        self.answer(404 if known else 401, "")


def test_a_session_is_kept_renewed_before_its_end_and_replaced_when_it_is_void(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """AWS of a 401: "an invalid token. The recommended action is to generate a new token"."""
    now = 1000.0
    set_clock(monkeypatch, worker.notice, monotonic=lambda: now)
    server = HTTPServer(("127.0.0.1", 0), Sessions)
    server.opened = server.valid = 0  # type: ignore[attr-defined]
    with serving(server):
        notice = Notice("aws", f"http://127.0.0.1:{server.server_port}")
        assert not notice.given()
        assert not notice.given()
        assert server.opened == 1  # type: ignore[attr-defined]
        now += worker.notice.TOKEN_SECONDS - 1
        assert not notice.given()
        assert server.opened == 2  # type: ignore[attr-defined]
        server.valid = 0  # type: ignore[attr-defined]
        with pytest.raises(OSError, match="401"):
            notice.given()
        assert not notice.given()
        assert server.opened == 3  # type: ignore[attr-defined]


def test_a_service_in_trouble_is_no_all_clear() -> None:
    """Only 404 says that there is no notice, and a machine without a name knows none of its events."""

    class Trouble(Metadata):
        def do_GET(self) -> None:
            if "compute/name" in self.path:
                return self.answer(200, "")
            if "scheduledevents" in self.path:
                return self.answer(200, json.dumps({"Events": [{"EventType": "Preempt", "Resources": [""]}]}))
            return self.answer(500, "")

    with serving(HTTPServer(("127.0.0.1", 0), Trouble)) as server:
        url = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(OSError, match="500"):
            Notice("aws", url).given()
        with pytest.raises(ValueError, match="no name"):
            Notice("azure", url).given()


def test_a_proxy_is_not_asked(metadata: HTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own metadata service would answer, if any did."""
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert not Notice("gcp", f"http://127.0.0.1:{metadata.server_port}").given()


def test_a_service_that_is_not_there_is_no_notice(caplog: pytest.LogCaptureFixture) -> None:
    notice = Notice("gcp", "http://127.0.0.1:1")
    with pytest.raises(OSError):
        notice.given()
    called = threading.Event()
    notice.watch(called.set)
    assert not called.wait(0.3)
    assert "does not answer" in caplog.text


@pytest.mark.parametrize(
    "reply", [b"\r\n\r\nnonsense\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n[]"]
)
def test_nonsense_does_not_end_the_watch(
    reply: bytes, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half an answer, or none of HTTP's: it may be a proxy that starts, and the next answer counts.

    Each outage is said once.
    """
    monkeypatch.setattr(worker.notice, "POLL_SECONDS", 0.01)
    no, yes = (b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(w), w) for w in (b"FALSE", b"TRUE"))
    replies = [reply, reply, no, reply, yes]

    class Talks(BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(9999)
            self.request.sendall(replies.pop(0))

    with serving(TCPServer(("127.0.0.1", 0), Talks)) as server:
        called = threading.Event()
        Notice("gcp", f"http://127.0.0.1:{server.server_address[1]}").watch(called.set)
        assert called.wait(5)
    assert replies == []
    assert caplog.text.count("does not answer") == 2


@pytest.mark.parametrize(
    "body",
    [
        "[]",
        '{"Events": ["Preempt"]}',
        '{"Events": 3}',
        '{"Events": [{"EventType": "Preempt", "Resources": 3}]}',
    ],
)
def test_events_of_another_shape_are_named(body: str) -> None:
    class Says(Metadata):
        def do_GET(self) -> None:
            self.answer(200, body)

    with (
        serving(HTTPServer(("127.0.0.1", 0), Says)) as server,
        pytest.raises(ValueError, match="scheduled events"),
    ):
        Notice("azure", f"http://127.0.0.1:{server.server_port}").given()

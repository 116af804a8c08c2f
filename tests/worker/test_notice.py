"""Spot-interruption notices, against a server that speaks like each cloud's metadata service."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

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
        else:
            assert self.headers["Metadata"] == "true"
            kinds = ["Reboot", "Preempt"] if reclaimed else ["Reboot"]
            self.answer(200, json.dumps({"Events": [{"EventType": kind} for kind in kinds]}))

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


def test_a_service_that_is_not_there_is_no_notice(caplog: pytest.LogCaptureFixture) -> None:
    notice = Notice("gcp", "http://127.0.0.1:1")
    with pytest.raises(OSError):
        notice.given()
    called = threading.Event()
    notice.watch(called.set)
    assert not called.wait(0.3)
    assert "does not answer" in caplog.text

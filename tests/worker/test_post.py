"""The pinned connection over TLS: to the address that was checked, with the name still verified."""

import ssl
from pathlib import Path

import pytest

from jobs import addresses
from tests.support.tls import self_signed
from tests.worker.receiver import RawReceiver
from worker import post as post_module
from worker.post import post

NAME = "hooks.example"


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    return self_signed(NAME, tmp_path / "cert.pem")


@pytest.fixture
def pinned(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> ssl.SSLContext:
    """Every name resolves to loopback, and posts trust the certificate; the server's TLS context."""
    monkeypatch.setattr(addresses, "_getaddrinfo", lambda host, port: ["127.0.0.1"])
    monkeypatch.setattr(post_module, "_tls", lambda: ssl.create_default_context(cafile=str(certificate)))
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate)
    return server


def test_the_name_is_verified_though_the_address_is_pinned(pinned: ssl.SSLContext) -> None:
    asked: list[str] = []
    pinned.sni_callback = lambda _socket, name, _context: asked.append(name)
    with RawReceiver(tls=pinned) as receiver:
        answer = post(f"https://{NAME}:{receiver.port}/x", b"{}", {}, allow_loopback=True)
        assert answer.status == 204, answer
        assert asked == [NAME]
        assert receiver.received[0].headers["host"] == f"{NAME}:{receiver.port}"


def test_a_certificate_for_another_name_is_refused(pinned: ssl.SSLContext) -> None:
    with RawReceiver(tls=pinned) as receiver:
        answer = post(f"https://other.example:{receiver.port}/x", b"{}", {}, allow_loopback=True)
        assert answer.status is None
        assert "CERTIFICATE_VERIFY_FAILED" in answer.error
        assert receiver.received == []


def test_a_name_that_turns_inward_is_not_connected_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """DNS rebinding: public when submitted, loopback when sent."""
    with RawReceiver() as receiver:
        monkeypatch.setattr(addresses, "_getaddrinfo", lambda host, port: ["127.0.0.1"])
        answer = post("https://rebound.example/", b"{}", {}, allow_loopback=False)
        assert answer.status is None
        assert "loopback" in answer.error
        assert receiver.received == []


def test_the_next_address_of_a_name_is_tried_when_one_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no more than three are."""
    found = ["127.0.0.2", "127.0.0.3", "127.0.0.1"]
    monkeypatch.setattr(addresses, "_getaddrinfo", lambda host, port: found)
    with RawReceiver() as receiver:
        url = f"http://{NAME}:{receiver.port}/"
        assert post(url, b"{}", {}, allow_loopback=True).status == 204
        found.insert(0, "127.0.0.4")
        answer = post(url, b"{}", {}, allow_loopback=True)
        assert answer.status is None
        assert "ConnectError" in answer.error
        assert len(receiver.received) == 1

"""The pinned connection over TLS: to the address that was checked, with the name still verified."""

import datetime
import ssl
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from jobs import addresses
from tests.worker.receiver import RawReceiver
from worker import post as post_module
from worker.post import post

NAME = "hooks.example"


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A self-signed certificate for NAME, with its key in the same file."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, NAME)])
    now = datetime.datetime.now(datetime.UTC)
    built = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(NAME)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path / "cert.pem"
    path.write_bytes(
        built.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return path


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

"""`reel listen` takes what is signed right, and nothing else."""

import http.client
import io
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import httpx
import pytest
from standardwebhooks.webhooks import Webhook

from infra.receiver import MAX_BODY, Receiver
from tests.support.serving import serving

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
EVENT = {"type": "job.succeeded", "timestamp": "2026-11-24T00:00:00Z", "data": {"id": "job_1"}}


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    server = Receiver("127.0.0.1", 0, SECRET, io.StringIO())
    with serving(server):
        yield server


def post(
    receiver: Receiver, body: str, message: str = "msg_1", at: datetime | None = None, secret: str = SECRET
) -> int:
    at = at or datetime.now(UTC)
    headers = {
        "webhook-id": message,
        "webhook-timestamp": str(int(at.timestamp())),
        "webhook-signature": Webhook(secret).sign(message, at, body),
    }
    return httpx.post(
        f"http://127.0.0.1:{receiver.server_address[1]}/", content=body, headers=headers
    ).status_code


def printed(receiver: Receiver) -> list[dict[str, object]]:
    assert isinstance(receiver.out, io.StringIO)
    return [json.loads(line) for line in receiver.out.getvalue().splitlines()]


def test_a_signed_event_is_printed_and_a_repeat_is_marked(receiver: Receiver) -> None:
    assert post(receiver, json.dumps(EVENT)) == 204
    assert post(receiver, json.dumps(EVENT)) == 204
    first, second = printed(receiver)
    assert first == {"webhook-id": "msg_1", "verified": True, "duplicate": False, **EVENT}
    assert second["duplicate"] is True


@pytest.mark.parametrize("case", ["wrong secret", "old", "no headers", "changed body", "not utf-8"])
def test_anything_else_is_refused(receiver: Receiver, case: str) -> None:
    url = f"http://127.0.0.1:{receiver.server_address[1]}/"
    body = json.dumps(EVENT)
    if case == "wrong secret":
        assert post(receiver, body, secret="whsec_" + "A" * 32) == 401
    elif case == "old":
        assert post(receiver, body, at=datetime.now(UTC) - timedelta(minutes=10)) == 401
    elif case == "no headers":
        assert httpx.post(url, content=body).status_code == 401
    elif case == "changed body":
        now = datetime.now(UTC)
        headers = {
            "webhook-id": "m",
            "webhook-timestamp": str(int(now.timestamp())),
            "webhook-signature": Webhook(SECRET).sign("m", now, body),
        }
        assert httpx.post(url, content=body + " ", headers=headers).status_code == 401
    else:
        assert httpx.post(url, content=b"\xff").status_code == 401
    (line,) = printed(receiver)
    assert line["verified"] is False
    assert line["reason"]


def test_a_body_that_is_too_large_is_not_read(receiver: Receiver) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", receiver.server_address[1], timeout=5)
    connection.putrequest("POST", "/")
    connection.putheader("Content-Length", str(MAX_BODY + 1))
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()
    assert printed(receiver) == []

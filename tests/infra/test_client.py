"""The small client of the REST API: repeats that make no second job, and what it says when none is taken."""

import httpx
import pytest

from infra import client
from infra.errors import CliError
from infra.ports import PortBlock
from tests.support.clock import set_clock


def test_a_job_that_nobody_takes_is_refused_with_the_last_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    set_clock(monkeypatch, client, sleep=lambda seconds: None)
    block = PortBlock.claim()
    try:
        nobody = client.ReelClient(f"http://127.0.0.1:{block.ports[0]}", "key")
        with nobody, pytest.raises(CliError, match=r"three tries; at last: .* did not answer: .*refused"):
            nobody.submit({"prompt": "a red ball"})
    finally:
        block.release()


def test_a_repeat_is_the_same_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that was taken though its answer was lost must not be made twice; a refusal is not repeated."""
    set_clock(monkeypatch, client, sleep=lambda seconds: None)
    answers = iter([(503, {"detail": "away"}), (502, {"detail": "odd"}), (503, {}), (202, {"id": "job_x"})])
    keys: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        keys.append(request.headers["idempotency-key"])
        status, body = next(answers)
        return httpx.Response(status, json=body)

    api = client.ReelClient("http://127.0.0.1:1", "key")
    api._http = httpx.Client(base_url=api.url, transport=httpx.MockTransport(answer))
    with api:
        with pytest.raises(CliError, match="odd"):
            api.submit({"prompt": "a red ball"})
        assert len(keys) == 2
        assert api.submit({"prompt": "a red ball"})["id"] == "job_x"
    assert keys[0] == keys[1] != keys[2] == keys[3]

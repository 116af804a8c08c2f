"""The small client of the REST API: what it says when an API does not take a job."""

import pytest

from infra import client
from infra.errors import CliError
from infra.ports import PortBlock


def test_a_job_that_nobody_takes_is_refused_with_the_last_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client.time, "sleep", lambda seconds: None)
    block = PortBlock.claim()
    try:
        nobody = client.ReelClient(f"http://127.0.0.1:{block.ports[0]}", "key")
        with nobody, pytest.raises(CliError, match=r"three tries; at last: .* did not answer: .*refused"):
            nobody.submit({"prompt": "a red ball"})
    finally:
        block.release()

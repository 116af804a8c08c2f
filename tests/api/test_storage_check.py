"""An S3 that accepts and never answers: what needs no S3 goes on."""

import io
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from PIL import Image

from api.storage_check import StorageCheck
from jobs.errors import StorageUnavailable
from jobs.settings import Settings
from tests.api.conftest import serve

CROWD = 60  # more than the server has threads


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a server that takes every connection and says nothing."""
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def test_submits_go_on_while_s3_hangs(
    settings: Settings, silent: str, client_for: Callable[..., httpx.Client], node: object
) -> None:
    changed = settings.model_copy(update={"s3_endpoint": silent, "s3_public_endpoint": None})
    picture = io.BytesIO()
    Image.new("RGB", (64, 64)).save(picture, "PNG")
    with serve(changed) as found, ThreadPoolExecutor(CROWD) as pool:
        client = client_for(url=found.url)

        def submit() -> str:
            answer = client.post("/v1/jobs", json={"prompt": "a cat"})
            assert answer.status_code == 202, answer.text
            return str(answer.json()["id"])

        ended = [submit() for _ in range(20)]
        for job_id in ended:
            assert client.post(f"/v1/jobs/{job_id}/cancel").status_code == 200
        began = time.monotonic()
        ready = [pool.submit(httpx.get, f"{found.url}/readyz", timeout=60) for _ in range(20)]
        gone = [pool.submit(client.delete, f"/v1/jobs/{job_id}") for job_id in ended]
        files = {"file": ("a.png", picture.getvalue(), "image/png")}
        sent = [pool.submit(client.post, "/v1/uploads", files=files) for _ in range(20)]
        submit()
        assert time.monotonic() - began < 10
        assert all("s3" in one.result().json()["missing"] for one in ready)
        assert {one.result().status_code for one in gone} == {204}
        assert {one.result().status_code for one in sent} <= {503, 429}
        assert time.monotonic() - began < 30
        assert "reel_storage_up 0.0" in httpx.get(f"{found.url}/metrics", timeout=30).text


def test_one_asks_for_all() -> None:
    asked: list[int] = []
    inside, go = threading.Event(), threading.Event()

    def ready() -> bool:
        asked.append(1)
        inside.set()
        assert go.wait(10)
        return len(asked) == 1

    check = StorageCheck(ready, "videos")
    with ThreadPoolExecutor(8) as pool:
        looks = [pool.submit(check.look) for _ in range(8)]
        assert inside.wait(10)
        go.set()
        assert all(one.result().ok for one in looks)
    assert len(asked) == 1
    check.demand()
    assert check._known is not None
    check._known = check._known[0], 0.0  # no longer counts
    go.clear()
    inside.clear()
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(check.look)
        assert inside.wait(10)
        assert check.look().ok, "the last answer, while another asks"
        go.set()
        assert not asking.result().ok
    with pytest.raises(StorageUnavailable, match="there is no bucket videos"):
        check.demand()

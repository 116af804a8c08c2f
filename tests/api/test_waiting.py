"""``Prefer: wait``: an answer that is held until the job has moved, but never for longer than asked."""

import threading
import time

import httpx
from fastapi.testclient import TestClient

from api.app import create_app
from jobs.keys import ApiKey
from jobs.settings import Settings
from jobs.store import JobStore
from tests.api.conftest import MODEL, finish, submit

PROMPT = "a red ball rolls over a table"


def test_prefer_wait_ends_with_the_job(client: httpx.Client, store: JobStore, settings: Settings) -> None:
    worker = threading.Timer(0.5, lambda: finish(store, settings))
    worker.start()
    began = time.monotonic()
    answer = client.post("/v1/jobs", json={"prompt": PROMPT}, headers={"Prefer": "respond-async, wait=20"})
    worker.join()
    assert 0.4 < time.monotonic() - began < 15
    assert answer.status_code == 200
    assert answer.json()["state"] == "succeeded"
    assert answer.headers["preference-applied"] == "wait=20"


def test_prefer_wait_gives_up(client: httpx.Client) -> None:
    began = time.monotonic()
    answer = client.post("/v1/jobs", json={"prompt": PROMPT}, headers={"Prefer": "wait=1"})
    assert 0.9 < time.monotonic() - began < 10
    assert answer.status_code == 202
    assert answer.json()["state"] == "queued"
    strange = client.get(f"/v1/jobs/{answer.json()['id']}", headers={"Prefer": "wait=soon"})
    assert strange.status_code == 200
    assert "preference-applied" not in strange.headers


def test_long_poll_with_an_etag(client: httpx.Client, store: JobStore) -> None:
    """With If-None-Match the answer comes at the next change, and 304 when none came."""
    url = f"/v1/jobs/{submit(client)['id']}"
    tag = client.get(url).headers["etag"]
    still = client.get(url, headers={"If-None-Match": tag, "Prefer": "wait=1"})
    assert still.status_code == 304
    worker = threading.Timer(0.5, lambda: store.claim(MODEL, "node-a"))
    worker.start()
    moved = client.get(url, headers={"If-None-Match": tag, "Prefer": "wait=20"})
    worker.join()
    assert moved.status_code == 200
    assert moved.json()["state"] == "running"


def test_the_operators_longest_wait_holds(settings: Settings, key: tuple[ApiKey, str]) -> None:
    """Whatever a client prefers; the answer says how long it was."""
    headers = {"Authorization": f"Bearer {key[1]}", "Prefer": "wait=600"}
    with TestClient(create_app(settings.model_copy(update={"max_wait_seconds": 0}))) as client:
        answer = client.post("/v1/jobs", json={"prompt": PROMPT}, headers=headers)
        assert answer.status_code == 202
        assert "preference-applied" not in answer.headers
    with TestClient(create_app(settings.model_copy(update={"max_wait_seconds": 1}))) as client:
        began = time.monotonic()
        answer = client.get(answer.json()["links"]["self"], headers=headers)
        assert time.monotonic() - began < 10
        assert answer.headers["preference-applied"] == "wait=1"

"""Reading, listing, canceling, deleting, downloading."""

import time
from collections.abc import Callable
from datetime import datetime
from typing import Any

import httpx
import pytest

from jobs.client import RedisClient
from jobs.job import JobError, NewJob, Phase
from jobs.keys import Scope
from jobs.nodes import NodeInfo, NodeRegistry
from jobs.settings import Settings
from jobs.storage import ObjectStore
from jobs.store import JobStore
from jobs.timings import Timings
from tests.api.conftest import MODEL, finish, serve, submit
from tests.support.jobs import new_job

PROMPT = "a red ball rolls over a table"


def test_pages_are_complete_and_stable(client: httpx.Client) -> None:
    ids = [submit(client)["id"] for _ in range(7)]
    seen: list[str] = []
    url = "/v1/jobs?limit=3"
    for _ in range(5):
        answer = client.get(url)
        page = answer.json()
        seen += [job["id"] for job in page["data"]]
        submit(client)  # newer jobs don't shift the pages
        assert page["has_more"] == (page["next_cursor"] is not None) == ("link" in answer.headers)
        if not page["has_more"]:
            break
        url = answer.links["next"]["url"]
        assert f"cursor={page['next_cursor']}" in url
    assert seen == ids[::-1]


def test_filters(client: httpx.Client, store: JobStore, settings: Settings) -> None:
    first = submit(client, metadata={"ref": "a b&c"})
    second = submit(client, metadata={"ref": "other"})
    finish(store, settings)

    def ids(**query: str) -> list[Any]:
        return [job["id"] for job in client.get("/v1/jobs", params=query).json()["data"]]

    assert ids(state="succeeded") == [first["id"]]
    assert ids(state="queued") == [second["id"]]
    assert ids(**{"metadata.ref": "a b&c"}) == [first["id"]]
    assert ids(**{"metadata.ref": "a b&c", "state": "queued"}) == []
    assert ids(model="tiny") == [second["id"], first["id"]]
    assert ids(model="none") == []


def test_admin_sees_all(client: httpx.Client, client_for: Callable[..., httpx.Client]) -> None:
    job = submit(client)
    admin = client_for(Scope.ADMIN)
    assert [item["id"] for item in admin.get("/v1/jobs").json()["data"]] == [job["id"]]
    assert admin.get(f"/v1/jobs/{job['id']}").status_code == 200


def test_etag(client: httpx.Client, store: JobStore) -> None:
    job = submit(client)
    first = client.get(f"/v1/jobs/{job['id']}")
    for tag in (first.headers["etag"], "W/" + first.headers["etag"], '"x", ' + first.headers["etag"], "*"):
        same = client.get(f"/v1/jobs/{job['id']}", headers={"If-None-Match": tag})
        assert same.status_code == 304
        assert same.content == b""
        assert same.headers["etag"] == first.headers["etag"]
        assert "private" in same.headers["cache-control"], "no cache between may keep it"
    page = client.get("/v1/jobs")
    assert client.get("/v1/jobs", headers={"If-None-Match": page.headers["etag"]}).status_code == 304
    store.claim(MODEL, "node-a")
    moved = client.get(f"/v1/jobs/{job['id']}", headers={"If-None-Match": first.headers["etag"]})
    assert moved.status_code == 200
    assert moved.json()["state"] == "running"
    made = client.post("/v1/jobs", json={"prompt": PROMPT}, headers={"If-None-Match": "*"})
    assert made.status_code == 202, "304 would hide the new job's id"


def test_progress_is_shown(client: httpx.Client, store: JobStore) -> None:
    job_id = str(submit(client)["id"])
    job = store.claim(MODEL, "node-a")
    assert job is not None
    store.heartbeat(job_id, job.token, phase=Phase.DENOISING, step=2, progress=0.5, eta_seconds=12.25)
    seen = client.get(f"/v1/jobs/{job_id}").json()
    assert (seen["phase"], seen["step"], seen["progress"], seen["eta_seconds"]) == (
        "denoising",
        2,
        0.5,
        12.25,
    )
    assert seen["queue_position"] is None
    assert "token" not in seen
    assert "owner" not in seen


def test_failure_is_shown(client: httpx.Client, store: JobStore) -> None:
    job_id = str(submit(client)["id"])
    job = store.claim(MODEL, "node-a")
    assert job is not None
    error = JobError(type="bad-image", title="Bad image", detail="It is blank.", failure_class="user")
    store.fail(job_id, job.token, error)
    seen = client.get(f"/v1/jobs/{job_id}").json()
    assert seen["state"] == "failed"
    assert seen["error"] == error.model_dump(mode="json")


def test_queue_position(client: httpx.Client) -> None:
    jobs = [submit(client) for _ in range(3)]
    assert [job["queue_position"] for job in jobs] == [0, 1, 2]
    client.post(f"/v1/jobs/{jobs[0]['id']}/cancel")
    assert client.get(f"/v1/jobs/{jobs[2]['id']}").json()["queue_position"] == 1


def test_estimated_start_and_eta(client: httpx.Client, store: JobStore, redis: RedisClient) -> None:
    """From what runs and what earlier videos took; nothing where nothing is known."""
    first, second = submit(client), submit(client)
    assert (first["estimated_start_at"], first["eta_seconds"]) == (None, None)
    Timings(redis).learn(new_job().request, {"denoising": 8.0, "decoding": 2.0})
    running = store.claim(MODEL, "node-a")
    assert running is not None
    NodeRegistry(redis).register(NodeInfo(id="node-a", model=MODEL, state="busy", job_id=running.id))
    time.sleep(1.1)  # the API looks at its nodes once a second
    seen = client.get(f"/v1/jobs/{first['id']}").json()
    assert 0 < seen["eta_seconds"] <= 10
    assert seen["estimated_start_at"] is None
    answer = client.get(f"/v1/jobs/{second['id']}")
    start = datetime.fromisoformat(answer.json()["estimated_start_at"]).timestamp()
    assert running.started_at is not None
    assert start == pytest.approx(running.started_at + 10, abs=1.01)
    tag = {"If-None-Match": answer.headers["etag"]}
    assert client.get(f"/v1/jobs/{second['id']}", headers=tag).status_code == 304


def test_cancel(client: httpx.Client, store: JobStore) -> None:
    queued = str(submit(client)["id"])
    answer = client.post(f"/v1/jobs/{queued}/cancel")
    assert (answer.status_code, answer.json()["state"]) == (200, "canceled")
    again = client.post(f"/v1/jobs/{queued}/cancel")
    assert again.status_code == 409
    assert again.json()["type"] == "/problems/wrong-state"
    running = str(submit(client)["id"])
    job = store.claim(MODEL, "node-a")
    assert job is not None
    answer = client.post(f"/v1/jobs/{running}/cancel")
    assert (answer.status_code, answer.json()["state"]) == (202, "running")
    assert answer.json()["cancel_requested"] is True
    store.cancel_running(running, job.token)
    assert client.get(f"/v1/jobs/{running}").json()["state"] == "canceled"


def test_delete(client: httpx.Client, store: JobStore, settings: Settings) -> None:
    job_id = str(submit(client)["id"])
    assert client.delete(f"/v1/jobs/{job_id}").status_code == 409
    job = finish(store, settings)
    assert job.result is not None
    assert ObjectStore(settings).head(job.result.video_key) is not None
    assert client.delete(f"/v1/jobs/{job_id}").status_code == 204
    assert client.get(f"/v1/jobs/{job_id}").status_code == 404
    assert client.delete(f"/v1/jobs/{job_id}").status_code == 404
    assert ObjectStore(settings).list_keys(f"jobs/{job_id}/") == []
    assert client.get("/v1/jobs").json()["data"] == []


def test_video_and_poster(client: httpx.Client, store: JobStore, settings: Settings) -> None:
    job_id = str(submit(client)["id"])
    early = client.get(f"/v1/jobs/{job_id}/video")
    assert early.status_code == 409
    assert "queued" in early.json()["detail"]
    finish(store, settings)
    for name, kind in (("video", "video/mp4"), ("poster", "image/jpeg")):
        redirect = client.get(f"/v1/jobs/{job_id}/{name}")
        assert redirect.status_code == 302
        assert redirect.headers["cache-control"] == "no-store"
        answer = client.get(f"/v1/jobs/{job_id}/{name}", headers={"Accept": "application/json"})
        assert answer.headers["cache-control"] == "no-store"
        told = answer.json()
        assert set(told) == {"url", "expires_at"}
        for url in (redirect.headers["location"], told["url"]):
            file = httpx.get(url)  # no key goes along: the signature alone opens it
            assert file.status_code == 200
            assert file.headers["content-type"] == kind
        saved = client.get(f"/v1/jobs/{job_id}/{name}?download=true").headers["location"]
        assert f"attachment; filename*=UTF-8''{job_id}." in httpx.get(saved).headers["content-disposition"]
        part = httpx.get(told["url"], headers={"Range": "bytes=0-3"})
        assert (part.status_code, len(part.content)) == (206, 4)
        broken = told["url"].replace(job_id, "job_" + "0" * 25)
        assert httpx.get(broken).status_code == 403


def test_an_address_opens_one_file_for_a_short_time(
    settings: Settings, client: httpx.Client, client_for: Callable[..., httpx.Client], store: JobStore
) -> None:
    with serve(settings.model_copy(update={"presign_seconds": 3})) as short:
        brief = client_for(url=short.url)
        job_id = str(submit(brief)["id"])
        finish(store, settings)
        told = brief.get(f"/v1/jobs/{job_id}/video", headers={"Accept": "application/json"}).json()
        assert httpx.get(told["url"]).status_code == 200
        assert httpx.get(told["url"].replace("video.mp4", "poster.jpg")).status_code == 403
        time.sleep(4.1)
        assert httpx.get(told["url"]).status_code == 403
    submit(client)
    job = finish(store, settings)
    told = client.get(f"/v1/jobs/{job.id}/video", headers={"Accept": "application/json"}).json()
    left = datetime.fromisoformat(told["expires_at"]).timestamp() - time.time()
    assert 600 < left <= 900


def test_webhook_deliveries(client: httpx.Client, store: JobStore, settings: Settings, key: Any) -> None:
    made: NewJob = new_job(
        callback_url="https://hooks.example/x",
        webhook_events=("job.started", "job.succeeded"),
        key_id=client.get("/v1/key").json()["id"],
    )
    store.submit(made)
    finish(store, settings)
    url = f"/v1/jobs/{made.id}/webhooks"
    data = client.get(url).json()["data"]
    assert [item["event"] for item in data] == ["job.started", "job.succeeded"]
    assert {item["state"] for item in data} == {"pending"}
    assert data[1]["data"]["state"] == "succeeded"
    again = client.post(f"{url}/{data[0]['id']}/redeliver")
    assert again.status_code == 202
    assert again.json()["id"] == data[0]["id"]
    other = submit(client)
    for path in (f"{url}/msg_none/redeliver", f"/v1/jobs/{other['id']}/webhooks/{data[0]['id']}/redeliver"):
        assert client.post(path).json()["type"] == "/problems/not-found"


def test_models_key_and_nodes(
    client: httpx.Client,
    client_for: Callable[..., httpx.Client],
    redis: RedisClient,
    store: JobStore,
    node: object,
) -> None:
    model = client.get("/v1/models").json()["data"][0]
    assert (model["id"], model["live"], model["sizes"]) == ("tiny", True, ["64*48", "128*96"])
    assert model["defaults"]["guide_scale"] == [3.0, 4.0]
    assert sorted(client.get("/v1/key").json()["scopes"]) == ["read", "submit"]
    nodes = client_for(Scope.ADMIN).get("/v1/nodes").json()["data"]
    assert [(item["id"], item["live"], item["state"]) for item in nodes] == [("node-a", True, "idle")]
    submit(client)
    job = store.claim(MODEL, "node-a")
    assert job is not None
    store.heartbeat(job.id, job.token, phase=Phase.DENOISING, step=2, progress=0.5)
    vitals = {"memory_used": 60 * 2**30, "memory_total": 80 * 2**30, "step_seconds": 1.25}
    NodeRegistry(redis).beat("node-a", "busy", job.id, **vitals)
    (seen,) = client_for(Scope.ADMIN).get("/v1/nodes").json()["data"]
    assert (seen["job_id"], seen["progress"]) == (job.id, 0.5)
    assert {name: seen[name] for name in vitals} == vitals
    assert seen["draining"] is False
    NodeRegistry(redis).request_drain("node-a")
    (seen,) = client_for(Scope.ADMIN).get("/v1/nodes").json()["data"]
    assert (seen["draining"], seen["live"], seen["state"]) == (True, True, "busy")


@pytest.mark.parametrize("public", ["https://reel.example", "https://reel.example/"])
def test_links_use_the_public_address(settings: Settings, public: str, keys: Any) -> None:
    from fastapi.testclient import TestClient

    from api.app import create_app

    _, plain, _ = keys.create("links")
    with TestClient(create_app(settings.model_copy(update={"public_url": public}))) as inside:
        job = inside.post(
            "/v1/jobs", json={"prompt": PROMPT}, headers={"Authorization": f"Bearer {plain}"}
        ).json()
    assert job["links"]["events"] == f"https://reel.example/v1/jobs/{job['id']}/events"

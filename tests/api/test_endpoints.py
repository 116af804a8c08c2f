"""``/v1/webhooks``: a secret shown once, changes, tests, the log, rotation; and one key's alone."""

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from jobs.keys import Scope
from jobs.settings import Settings
from jobs.store import JobStore
from tests.api.conftest import Running, finish, submit

URL = "https://1.1.1.1/hook"
Meanwhile = Callable[[Callable[[], object]], None]


def add(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    answer = client.post("/v1/webhooks", json={"url": URL, **fields})
    assert answer.status_code == 201, answer.text
    made: dict[str, Any] = answer.json()
    return made


def test_the_life_of_an_endpoint(client: httpx.Client, store: JobStore, settings: Settings) -> None:
    made = add(client, events=["job.started", "job.succeeded", "job.started"], description="orders")
    secret = made.pop("secret")
    assert secret.startswith("whsec_")
    assert made["events"] == ["job.started", "job.succeeded"]
    path = f"/v1/webhooks/{made['id']}"
    assert client.get(path).json() == made
    assert client.get("/v1/webhooks").json()["data"] == [made]
    assert secret not in client.get(path).text + client.get("/v1/webhooks").text
    change = {"events": ["job.failed", "job.succeeded"], "description": "all"}
    changed = client.patch(path, json=change).json()
    assert changed == {**made, **change}

    job = submit(client)
    finish(store, settings)
    tested = client.post(f"{path}/test")
    assert (tested.status_code, tested.json()["event"]) == (202, "webhook.test")
    log = client.get(f"{path}/deliveries").json()["data"]
    assert [(item["event"], item["job_id"], item["state"]) for item in log] == [
        ("webhook.test", None, "pending"), ("job.succeeded", job["id"], "pending"),
    ]  # fmt: skip
    assert client.get(f"/v1/jobs/{job['id']}/webhooks").json()["data"] == [log[1]]
    again = client.post(f"{path}/deliveries/{log[1]['id']}/redeliver")
    assert (again.status_code, again.json()["id"]) == (202, log[1]["id"])
    assert client.post(f"{path}/deliveries/msg_none/redeliver").status_code == 404

    rotated = client.post(f"{path}/rotate").json()
    assert rotated["secret"] not in ("", secret)
    assert client.patch(path, json={"enabled": False}).json()["enabled"] is False
    submit(client)
    finish(store, settings)
    assert len(client.get(f"{path}/deliveries").json()["data"]) == 2
    assert client.delete(path).status_code == 204
    assert client.get(path).status_code == client.delete(path).status_code == 404


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "url"),
        ({"url": "http://1.1.1.1/"}, "url"),
        ({"url": "https://169.254.169.254/latest"}, "url"),
        ({"url": "https://localhost/"}, "url"),
        ({"url": 7}, "url"),
        ({"url": URL, "events": []}, "events"),
        ({"url": URL, "events": ["job.paused"]}, "events"),
        ({"url": URL, "description": "x" * 201}, "description"),
        ({"url": URL, "secret": "whsec_mine"}, "secret"),
    ],
)
def test_wrong_bodies_name_the_field(client: httpx.Client, body: dict[str, Any], field: str) -> None:
    answer = client.post("/v1/webhooks", json=body)
    assert answer.status_code == 422
    assert [item["field"] for item in answer.json()["errors"]] == [field]
    assert client.get("/v1/webhooks").json()["data"] == []


def test_a_change_is_checked_too(client: httpx.Client) -> None:
    path = f"/v1/webhooks/{add(client)['id']}"
    for body in ({"url": "https://10.0.0.1/"}, {"enabled": "no"}, {"id": "we_mine"}, {"key_id": "x"}):
        assert client.patch(path, json=body).status_code == 422, body
    assert client.get(path).json()["url"] == URL


@pytest.fixture(params=[1, 2], ids=["before the body", "before the write"])
def meanwhile(request: pytest.FixtureRequest, running: Running, monkeypatch: pytest.MonkeyPatch) -> Meanwhile:
    """Does something once, between a request's first or second look at its endpoint and what follows."""

    def arrange(act: Callable[[], object]) -> None:
        store, steps = running.services.endpoints, [act, *[lambda: None] * (request.param - 1)]
        look = store.text

        def late(key_id: str, endpoint_id: str) -> str | None:
            found = look(key_id, endpoint_id)
            if steps:
                steps.pop()()
            return found

        monkeypatch.setattr(store, "text", late)

    return arrange


def test_a_change_does_not_bring_a_deleted_endpoint_back(client: httpx.Client, meanwhile: Meanwhile) -> None:
    """It would have no secret, and nothing sent to it could be signed."""
    path = f"/v1/webhooks/{add(client)['id']}"
    meanwhile(lambda: client.delete(path))
    answer = client.patch(path, json={"description": "late"})
    assert (answer.status_code, answer.json()["type"]) == (404, "/problems/not-found")
    assert client.get("/v1/webhooks").json()["data"] == []


def test_two_changes_at_once_both_count(client: httpx.Client, meanwhile: Meanwhile) -> None:
    made = add(client)
    made.pop("secret")
    path = f"/v1/webhooks/{made['id']}"
    meanwhile(lambda: client.patch(path, json={"enabled": False}))
    changed = client.patch(path, json={"description": "second"}).json()
    assert changed == client.get(path).json() == {**made, "enabled": False, "description": "second"}


def test_another_keys_endpoint_is_not_found(
    client: httpx.Client, client_for: Callable[..., httpx.Client]
) -> None:
    path = f"/v1/webhooks/{add(client)['id']}"
    delivery = client.post(f"{path}/test").json()["id"]
    for other in (client_for(), client_for(Scope.ADMIN)):
        for method, suffix in (
            ("GET", ""), ("PATCH", ""), ("DELETE", ""), ("POST", "/rotate"), ("POST", "/test"),
            ("GET", "/deliveries"), ("POST", f"/deliveries/{delivery}/redeliver"),
        ):  # fmt: skip
            answer = other.request(method, path + suffix, json={} if method == "PATCH" else None)
            assert answer.status_code == 404, (method, suffix)
        assert other.get("/v1/webhooks").json()["data"] == []
    assert client.get(path).json()["enabled"] is True
    assert client_for(Scope.READ).post("/v1/webhooks", json={"url": URL}).status_code == 403


def test_a_delivery_is_sent_again_by_its_own_endpoint_only(
    client: httpx.Client, client_for: Callable[..., httpx.Client]
) -> None:
    """Else whoever learns a delivery's id could have another key's webhooks sent, and read their contents."""
    first, second = add(client), add(client)
    delivery = client.post(f"/v1/webhooks/{first['id']}/test").json()["id"]
    stranger = client_for()
    theirs = add(stranger)
    job = submit(stranger)
    for who, path in (
        (client, f"/v1/webhooks/{second['id']}/deliveries/{delivery}"),
        (stranger, f"/v1/webhooks/{theirs['id']}/deliveries/{delivery}"),
        (stranger, f"/v1/jobs/{job['id']}/webhooks/{delivery}"),
    ):
        answer = who.post(f"{path}/redeliver")
        assert (answer.status_code, answer.json()["type"]) == (404, "/problems/not-found"), path
        assert first["id"] not in answer.text
    assert client.post(f"/v1/webhooks/{first['id']}/deliveries/{delivery}/redeliver").status_code == 202


def test_at_most_ten(client: httpx.Client) -> None:
    for _ in range(10):
        add(client)
    answer = client.post("/v1/webhooks", json={"url": URL})
    assert (answer.status_code, answer.json()["type"]) == (409, "/problems/too-many")

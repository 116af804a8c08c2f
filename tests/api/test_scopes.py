"""What a key may do: its scopes, and its own things alone."""

import json
import re
from collections.abc import Callable

import httpx
import pytest

from jobs.keys import Scope
from tests.api.conftest import one_error, submit

PROMPT = "a red ball rolls over a table"


@pytest.mark.parametrize(
    ("scopes", "method", "path", "needed"),
    [
        ((Scope.READ,), "POST", "/v1/jobs", "submit"),
        ((Scope.READ,), "POST", "/v1/jobs/job_x/cancel", "submit"),
        ((Scope.READ,), "DELETE", "/v1/jobs/job_x", "submit"),
        ((Scope.READ,), "POST", "/v1/uploads", "submit"),
        ((Scope.SUBMIT,), "GET", "/v1/jobs", "read"),
        ((Scope.SUBMIT,), "GET", "/v1/jobs/job_x", "read"),
        ((Scope.SUBMIT,), "GET", "/v1/jobs/job_x/events", "read"),
        ((Scope.SUBMIT,), "GET", "/v1/jobs/job_x/video", "read"),
        ((Scope.SUBMIT,), "GET", "/v1/models", "read"),
        ((Scope.SUBMIT, Scope.READ), "GET", "/v1/nodes", "admin"),
    ],
)
def test_wrong_scope(
    client_for: Callable[..., httpx.Client], scopes: tuple[Scope, ...], method: str, path: str, needed: str
) -> None:
    error = one_error(client_for(*scopes).request(method, path), "forbidden", 403)
    assert error["field"] == "Authorization"
    assert error["expected"] == f"a key with {needed}"


def test_every_route_needs_its_scope(client_for: Callable[..., httpx.Client]) -> None:
    """What reads needs `read`, what changes anything `submit`: for all routes that the document lists."""
    reader, submitter = client_for(Scope.READ), client_for(Scope.SUBMIT)
    paths = reader.get("/openapi.json").json()["paths"]
    refused, asked = set(), set()
    for path in paths.keys() - {"/v1/key", "/v1/nodes"}:  # for any key; for admins alone
        for method in paths[path] if path.startswith("/v1/") else ():
            asked.add((method, path))
            key, needed = (submitter, "read") if method == "get" else (reader, "submit")
            answer = key.request(method, re.sub(r"{\w+}", "x", path))
            if answer.status_code == 403 and re.search(rf"expected\W+a key with {needed}\b", answer.text):
                refused.add((method, path))
    assert asked == refused
    assert len(asked) > 20


def test_high_priority_needs_its_scope(client_for: Callable[..., httpx.Client]) -> None:
    for scopes in ((Scope.SUBMIT, Scope.READ), (Scope.ADMIN,)):  # no other scope includes it
        answer = client_for(*scopes).post("/v1/jobs", json={"prompt": PROMPT, "priority": "high"})
        assert one_error(answer, "forbidden", 403)["field"] == "priority"
    high = client_for(Scope.SUBMIT, Scope.READ, Scope.PRIORITY_HIGH)
    assert submit(high, priority="high")["priority"] == "high"


def test_another_keys_job_is_not_found(client_for: Callable[..., httpx.Client], client: httpx.Client) -> None:
    """The answers for another key's job and for no job are the same but for their ids."""
    job = str(submit(client, callback_url=None)["id"])
    other = client_for()
    missing = "job_" + "0" * 25
    for method, path in (
        ("GET", "/v1/jobs/{}"),
        ("DELETE", "/v1/jobs/{}"),
        ("POST", "/v1/jobs/{}/cancel"),
        ("GET", "/v1/jobs/{}/events"),
        ("GET", "/v1/jobs/{}/video"),
        ("GET", "/v1/jobs/{}/poster"),
        ("GET", "/v1/jobs/{}/webhooks"),
        ("POST", "/v1/jobs/{}/webhooks/msg_1/redeliver"),
        ("GET", "/v1/videos/{}"),
        ("DELETE", "/v1/videos/{}"),
        ("GET", "/v1/videos/{}/content"),
    ):
        theirs = other.request(method, path.format(job))
        none = other.request(method, path.format(missing))
        assert theirs.status_code == none.status_code == 404, (method, path, theirs.text)
        bodies = [
            json.loads(answer.text.replace(job, "ID").replace(missing, "ID")) for answer in (theirs, none)
        ]
        for body in bodies:
            body.pop("request_id", None)
        assert bodies[0] == bodies[1]
    assert other.get("/v1/jobs").json()["data"] == []
    assert client.get(f"/v1/jobs/{job}").json()["state"] == "queued"

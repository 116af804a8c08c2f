"""Schemathesis over the OpenAPI document: no 5xx, no undocumented answer, nothing of another key's."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, status_code_conformance

from api.app import create_app
from api.webhook_schemas import WebhookTestBody
from jobs.keys import KeyStore, Scope
from jobs.settings import Settings
from tests.api.conftest import Running, submit

DOC = Path(__file__).resolve().parents[2] / "docs" / "api.md"
DOCUMENT = create_app(Settings(secret_key="x" * 40, s3_endpoint="http://127.0.0.1:1")).openapi()
SCHEMA = schemathesis.openapi.from_dict(DOCUMENT)
OPERATIONS = [found.ok() for found in SCHEMA.get_all_operations()]
CHECKS = (not_a_server_error, status_code_conformance, content_type_conformance)


CANARY = "canary-5d1e"
each_operation = pytest.mark.parametrize("operation", OPERATIONS, ids=lambda one: f"{one.method} {one.path}")


@dataclass
class World:
    """Keys; the first has a job, an endpoint and a delivery, all with CANARY in them."""

    url: str
    first: str
    second: str
    admin: str  # sees every key's jobs
    theirs: dict[str, str]  # path parameter to the first key's id

    def headers(self, plain: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {plain}"}

    def state(self) -> list[Any]:
        """Everything of the first key's that a request could change."""
        with httpx.Client(base_url=self.url, headers=self.headers(self.first), timeout=30) as client:
            paths = ("/v1/jobs", "/v1/webhooks", f"/v1/webhooks/{self.theirs['endpoint_id']}/deliveries")
            return [
                [{"id": item["id"], "state": item.get("state")} for item in client.get(path).json()["data"]]
                for path in paths
            ]


@pytest.fixture
def world(running: Running, keys: KeyStore, node: Any) -> World:
    first = keys.create("first", max_outstanding=5)[1]
    admin = keys.create("admin", (Scope.SUBMIT, Scope.READ, Scope.ADMIN), max_outstanding=5)[1]
    second = keys.create("second", (Scope.SUBMIT, Scope.READ), max_outstanding=5)[1]
    headers = {"Authorization": f"Bearer {first}"}
    with httpx.Client(base_url=running.url, headers=headers, timeout=30) as client:
        job = str(submit(client, prompt=CANARY, metadata={"ref": CANARY})["id"])
        made = client.post("/v1/webhooks", json={"url": "https://1.1.1.1/", "description": CANARY}).json()
        delivery = client.post(f"/v1/webhooks/{made['id']}/test").json()["id"]
    ids = {"job_id": job, "video_id": job, "endpoint_id": made["id"], "delivery_id": delivery}
    return World(running.url, first, second, admin, ids)


def probe(operation: Any, world: World, plain: str, examples: int, *, only_theirs: bool) -> None:
    """Random requests of one operation with this key; `only_theirs`: always about the first key's things."""

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(case=operation.as_strategy(), known=st.just(True) if only_theirs else st.booleans())
    def run(case: Any, known: bool) -> None:
        named = world.theirs.keys() & (case.path_parameters or {}).keys()
        for name in named if known else ():
            case.path_parameters[name] = world.theirs[name]
        sent = {name: value for name, value in (case.headers or {}).items() if name.lower() != "prefer"}
        case.headers = {**sent, **world.headers(plain)}  # no Prefer: it would wait for a job that nobody runs
        if operation.path.endswith("/events") and not only_theirs:  # endless for a live job
            case.path_parameters["job_id"] = "job_none"
        answer = case.call_and_validate(base_url=world.url, checks=list(CHECKS), timeout=20)
        if only_theirs:
            assert CANARY not in answer.text
            assert not named or 400 <= answer.status_code < 500, answer.status_code

    run()


@each_operation
def test_no_undocumented_answer(operation: Any, world: World) -> None:
    for plain in (world.first, world.admin):
        probe(operation, world, plain, 4, only_theirs=False)


@each_operation
def test_a_second_key_gets_nothing_of_the_firsts(operation: Any, world: World) -> None:
    before = world.state()
    probe(operation, world, world.second, 3, only_theirs=True)
    assert world.state() == before


@pytest.mark.slow
@pytest.mark.timeout(600)
@each_operation
def test_many_more_of_both(operation: Any, world: World) -> None:
    before = world.state()
    probe(operation, world, world.second, 150, only_theirs=True)
    assert world.state() == before
    probe(operation, world, world.first, 150, only_theirs=False)


def test_the_document_describes_every_operation() -> None:
    for path, methods in DOCUMENT["paths"].items():
        for method, operation in methods.items():
            assert operation.get("summary"), (method, path)
            assert operation.get("description"), (method, path)
            if path.startswith("/v1"):
                assert {"401", "429", "503"} <= set(operation["responses"]), (method, path)
    assert set(DOCUMENT["components"]["schemas"]["JobIn"]["properties"]) >= {"prompt", "size", "callback_url"}


def test_the_document_says_what_is_sent(
    client: httpx.Client, client_for: Callable[..., httpx.Client]
) -> None:
    """The test event's body; the façade's 400 and media types; rate headers where a key is known."""
    made = client.post("/v1/webhooks", json={"url": "https://1.1.1.1/"}).json()
    sent = client.post(f"/v1/webhooks/{made['id']}/test").json()
    body = {"type": sent["event"], "timestamp": sent["created_at"], "data": sent["data"]}
    WebhookTestBody.model_validate(body)
    described = DOCUMENT["webhooks"][sent["event"]]["post"]["requestBody"]["content"]["application/json"]
    assert described == {"schema": {"$ref": "#/components/schemas/WebhookTestBody"}}
    for path in (path for path in DOCUMENT["paths"] if path.startswith("/v1/videos")):
        for method, operation in DOCUMENT["paths"][path].items():
            refusal = operation["responses"].get("422", {"description": ""})
            assert "invalid-request" not in str(refusal), (method, path)
            assert refusal["description"] != "Validation Error"
    create = DOCUMENT["paths"]["/v1/videos"]["post"]
    for kind in create["requestBody"]["content"]:
        answer = client.post("/v1/videos", content=b"{", headers={"Content-Type": kind})
        assert answer.status_code == 400, kind
    assert len(create["requestBody"]["content"]) == 3
    known = client_for(Scope.READ).headers["Authorization"]
    for status, sent_key in (("401", "Bearer rk_wrong"), ("403", known)):
        answer = client.post("/v1/videos", json={}, headers={"Authorization": sent_key})
        assert answer.status_code == int(status)
        assert {"RateLimit", "X-Request-Id"} & set(create["responses"][status]["headers"]) == {
            name for name in ("RateLimit", "X-Request-Id") if name in answer.headers
        }

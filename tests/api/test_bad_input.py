"""Refusals: the field, what came, what is allowed, as problem+json; and nothing is queued."""

import httpx
import pytest

from api.problem import TYPES, FieldError
from jobs.client import RedisClient
from jobs.nodes import NodeRegistry
from jobs.store import JobStore
from tests.api.conftest import one_error, submit
from tests.support.jobs import card

PROMPT = "a red ball rolls over a table"

# field, what is sent, a part of what came, a part of what is allowed
WRONG = [
    ("prompt", "", "''", "1 to 2000 characters"),
    ("prompt", "   ", "'   '", "not only spaces"),
    ("prompt", "x" * 2001, "… (2001 characters)", "1 to 2000 characters"),
    ("prompt", 7, "7", "a text of 1 to 2000 characters"),
    ("prompt", None, "None", "a text of 1 to 2000 characters"),
    ("negative_prompt", "\n" * 2001, "… (2001 characters)", "at most 2000 characters"),
    ("negative_prompt", ["x"], "['x']", "a text"),
    ("model", "huge", "huge", "one of tiny"),
    ("model", 3, "3", "one of tiny"),
    ("size", "1280*720", "1280*720", "one of 64*48, 128*96"),
    ("size", "64x48", "64x48", "one of 64*48, 128*96"),
    ("size", [64, 48], "[64, 48]", "a text"),
    ("frame_num", 80, "80", "such as 77 or 81"),
    ("frame_num", 0, "0", "4n+1 from 1 to 81"),
    ("frame_num", 85, "85", "4n+1 from 1 to 81"),
    ("frame_num", -3, "-3", "4n+1"),
    ("frame_num", 5.0, "5.0", "a whole number 4n+1"),
    ("frame_num", "5", "5", "a whole number 4n+1"),
    ("frame_num", True, "True", "a whole number 4n+1"),
    ("shift", 0, "0", "0.01 to 100"),
    ("shift", 1e-15, "1e-15", "0.01 to 100"),
    ("shift", -1, "-1", "0.01 to 100"),
    ("shift", 101, "101", "0.01 to 100"),
    ("shift", "5", "5", "a number from 0.01 to 100"),
    ("sampling_steps", 0, "0", "1 to 100"),
    ("sampling_steps", 101, "101", "1 to 100"),
    ("sampling_steps", 1.5, "1.5", "a whole number"),
    ("guide_scale", -1, "-1", "from 0 to 100"),
    ("guide_scale", 101, "101", "from 0 to 100"),
    ("guide_scale", [3.0], "[3.0]", "a pair"),
    ("guide_scale", [3.0, 4.0, 5.0], "[3.0, 4.0, 5.0]", "a pair"),
    ("guide_scale", [3.0, -4.0], "-4.0", "from 0 to 100"),
    ("guide_scale", "4", "4", "a pair"),
    ("seed", -1, "-1", "0 to 2^63-1"),
    ("seed", 2**63, str(2**63), "0 to 2^63-1"),
    ("seed", 10**400, "1000", "0 to 2^63-1"),
    ("seed", "1", "1", "a whole number from 0"),
    ("sample_solver", "euler", "euler", "one of unipc, dpm++"),
    ("image", "img_0000000000000000000000000", "img_", "makes videos from text only"),
    ("priority", "urgent", "urgent", "one of high, normal, low"),
    ("deadline_seconds", 0, "0", "a number above 0"),
    ("deadline_seconds", 10**9, "1000000000", "at most 2592000"),
    ("deadline_seconds", "60", "60", "a number above 0"),
    ("callback_url", "http://example.com/x", "http://example.com/x", "https"),
    ("callback_url", "https://127.0.0.1/x", "https://127.0.0.1/x", "loopback"),
    ("callback_url", "x" * 3000, "xxx", "2048"),
    ("webhook_events", [], "[]", "a list of job.started"),
    ("webhook_events", ["job.paused"], "job.paused", "a list of job.started"),
    ("metadata", {"ref": 7}, "{'ref': 7}", "texts"),
    ("metadata", {"": "x"}, "{'': 'x'}", "names of 1 to 64"),
    ("metadata", {"x" * 65: "x"}, "xxx", "names of 1 to 64"),
    ("metadata", {"x": "y" * 501}, "yyy", "at most 500"),
    ("metadata", {str(n): "x" for n in range(17)}, "'0'", "at most 16"),
    ("metadata", "ref", "ref", "texts"),
    ("frames", 81, "81", "no such field; known are callback_url"),
]


@pytest.mark.parametrize(("field", "value", "got", "expected"), WRONG)
def test_wrong_field(
    client: httpx.Client, store: JobStore, field: str, value: object, got: str, expected: str
) -> None:
    answer = client.post("/v1/jobs", json={"prompt": PROMPT, field: value})
    error = one_error(answer, "invalid-request", 422)
    assert error["field"] == field
    assert got in error["got"]
    assert expected in error["expected"]
    assert len(error["got"]) < 120
    assert store.list("*")[0] == []


def test_the_documented_example_is_what_the_service_says(client: httpx.Client, redis: RedisClient) -> None:
    NodeRegistry(redis).publish_model(card(max_frame_num=121))
    error = one_error(
        client.post("/v1/jobs", json={"prompt": PROMPT, "frame_num": 80}), "invalid-request", 422
    )
    assert error == {
        name: field.examples[0] for name, field in FieldError.model_fields.items() if field.examples
    }


def test_missing_prompt(client: httpx.Client) -> None:
    error = one_error(client.post("/v1/jobs", json={}), "invalid-request", 422)
    assert error == {"field": "prompt", "got": "nothing", "expected": "a text of 1 to 2000 characters"}


def test_all_wrong_fields_at_once(client: httpx.Client) -> None:
    body = {"size": "1*1", "frame_num": 80, "shift": "x", "priority": "urgent", "foo": 1, "seed": -1}
    answer = client.post("/v1/jobs", json=body)
    fields = {item["field"] for item in answer.json()["errors"]}
    assert fields == {"prompt", "size", "frame_num", "shift", "priority", "foo", "seed"}
    assert answer.json()["detail"].startswith("7 fields cannot be accepted: ")


def test_image_is_needed_by_an_image_model(client: httpx.Client, redis: RedisClient) -> None:
    NodeRegistry(redis).publish_model(card(name="tiny", task="i2v"))
    error = one_error(client.post("/v1/jobs", json={"prompt": PROMPT}), "invalid-request", 422)
    assert error["field"] == "image"
    unknown = {"prompt": PROMPT, "image": "img_0000000000000000000000000"}
    error = one_error(client.post("/v1/jobs", json=unknown), "invalid-request", 422)
    assert error["field"] == "image"
    assert "an upload of this key" in error["expected"]


def test_two_models_and_no_default(client: httpx.Client, redis: RedisClient) -> None:
    NodeRegistry(redis).publish_model(card(name="other"))
    error = one_error(client.post("/v1/jobs", json={"prompt": PROMPT}), "invalid-request", 422)
    assert error == {"field": "model", "got": "nothing", "expected": "one of other, tiny"}


def test_no_model_yet(client: httpx.Client, redis: RedisClient) -> None:
    NodeRegistry(redis).withdraw_model("tiny")
    answer = client.post("/v1/jobs", json={"prompt": PROMPT})
    assert answer.status_code == 503
    assert answer.json()["type"] == "/problems/no-model"
    assert int(answer.headers["retry-after"]) > 0


MALFORMED = [
    (b"", "Expecting value at line 1, column 1"),
    (b"{", "line 1, column 2"),
    (b'{"prompt": "x",}', "line 1"),
    (b'{"prompt": "x"} x', "Extra data"),
    (b'{"prompt": NaN}', "NaN is not JSON"),
    (b'{"shift": -Infinity}', "-Infinity is not JSON"),
    (b'{"prompt": "a", "prompt": "b"}', "'prompt' comes twice"),
    (b'{"prompt": "\xff"}', "not UTF-8"),
    (b'{"prompt": "\\ud800"}', "surrogate"),
    (b'{"seed": ' + b"9" * 5000 + b"}", "digits"),
    (b"[" * 5000, "nested"),
    (b'{"prompt": ' + b"[" * 50 + b"]" * 50 + b"}", "nested"),
    (b'["prompt"]', "must be a JSON object"),
    (b'"prompt"', "must be a JSON object"),
    (b"null", "must be a JSON object"),
]


@pytest.mark.parametrize(("body", "detail"), MALFORMED, ids=range(len(MALFORMED)))
def test_malformed_json(client: httpx.Client, body: bytes, detail: str) -> None:
    answer = client.post("/v1/jobs", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert answer.json()["type"] == "/problems/malformed-json"
    assert detail in answer.json()["detail"]


def test_infinite_numbers_are_out_of_range(client: httpx.Client) -> None:
    body = b'{"prompt": "x", "shift": 1e999}'
    answer = client.post("/v1/jobs", content=body, headers={"Content-Type": "application/json"})
    assert one_error(answer, "invalid-request", 422)["field"] == "shift"


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_other_content_types(client: httpx.Client, kind: str) -> None:
    answer = client.post("/v1/jobs", content=b'{"prompt": "x"}', headers={"Content-Type": kind})
    error = one_error(answer, "unsupported-media-type", 415)
    assert error["field"] == "Content-Type"
    assert error["expected"] == "application/json"


def test_no_key_comes_before_the_body(client: httpx.Client) -> None:
    for headers in ({"Authorization": ""}, {"Authorization": "Basic eDp5"}, {"Authorization": "Bearer nope"}):
        answer = client.post(
            "/v1/jobs", content=b"{", headers={**headers, "Content-Type": "application/json"}
        )
        assert answer.status_code == 401, answer.text
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["type"] == "/problems/unauthenticated"
        assert answer.headers["www-authenticate"].startswith("Bearer")


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("state=done", "state"),
        ("limit=0", "limit"),
        ("limit=101", "limit"),
        ("limit=x", "limit"),
        ("cursor=%2B%5Bx", "cursor"),
        ("cursor=zzzz", "cursor"),
        ("cursor=job_0m7f3c2k9x1v5n8p4q6r7s2t1%0A", "cursor"),
        ("model=" + "x" * 101, "model"),
    ],
)
def test_wrong_query(client: httpx.Client, query: str, field: str) -> None:
    error = one_error(client.get(f"/v1/jobs?{query}"), "invalid-request", 422)
    assert error["field"] == field


def test_unknown_path_and_method(client: httpx.Client) -> None:
    assert client.get("/v1/nothing").json()["type"] == "/problems/not-found"
    answer = client.put("/v1/jobs")
    assert answer.status_code == 405
    assert answer.json()["type"] == "/problems/method-not-allowed"
    assert "POST" in answer.headers["allow"]


def test_every_problem_type_has_its_page(client: httpx.Client) -> None:
    for slug, kind in TYPES.items():
        page = client.get(kind.uri)
        assert page.status_code == 200
        assert kind.title in page.text
        assert slug in page.text
    assert client.get("/problems/none").status_code == 404


def test_allow_head_slashes_and_strange_names(client: httpx.Client) -> None:
    """`Allow` names all methods of the path; HEAD is GET without its body; no redirect follows the Host."""
    job = submit(client)
    path = f"/v1/jobs/{job['id']}"
    for method, target, allowed in (
        ("PUT", "/v1/jobs", "GET, HEAD, POST"),
        ("POST", path, "DELETE, GET, HEAD"),
        ("HEAD", f"{path}/cancel", "POST"),
        ("HEAD", f"{path}/events", "GET"),
    ):
        answer = client.request(method, target)
        assert (answer.status_code, answer.headers["allow"]) == (405, allowed), (method, target)
    for target in ("/v1/jobs", path, "/", "/web/app.js", "/healthz", "/openapi.json"):
        head, got = client.head(target), client.get(target)
        assert (head.status_code, head.content) == (200, b""), target
        assert head.headers["content-length"] == got.headers["content-length"]
    assert client.get("/v1/jobs/", headers={"Host": "evil.example"}).status_code == 404
    for name in ("a" * 300 + ".js", "a%00.js", "..%2Fapp.py", "nothing.js"):
        assert client.get(f"/web/{name}").status_code == 404, name

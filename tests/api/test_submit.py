"""Submitting: defaults, LoRAs, presets, idempotency, limits."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from fastapi.testclient import TestClient
from pydantic import ValidationError

from api.app import create_app
from jobs.addresses import CallbackRefused
from jobs.client import RedisClient
from jobs.keys import KeyStore
from jobs.nodes import NodeInfo, NodeRegistry
from jobs.quality import PresetCard
from jobs.settings import Settings
from jobs.store import JobStore
from jobs.timings import Timings
from tests.api.conftest import serve, submit
from tests.support.jobs import card, new_job

PROMPT = "a red ball rolls over a table"


def test_submit_fills_in_the_models_defaults(client: httpx.Client) -> None:
    answer = client.post("/v1/jobs", json={"prompt": PROMPT, "metadata": {"ref": "a"}})
    assert answer.status_code == 202
    job = answer.json()
    assert answer.headers["location"] == job["links"]["self"]
    assert job["state"] == "queued"
    assert (job["progress"], job["phase"], job["eta_seconds"], job["attempts"]) == (0, None, None, 0)
    assert job["queue_position"] == 0
    assert client.get(job["links"]["self"]).json() == job
    seed = job["request"].pop("seed")
    assert 0 <= seed < 2**53
    assert job["request"] == {
        "prompt": PROMPT,
        "negative_prompt": "",
        "model": "tiny",
        "size": "64*48",
        "frame_num": 5,
        "shift": 5.0,
        "sampling_steps": 4,
        "guide_scale": [3.0, 4.0],
        "sample_solver": "unipc",
        "image": None,
        "loras": [],
        "quality": "lossless",
    }
    assert job["metadata"] == {"ref": "a"}


def test_loras_come_back_with_their_defaults(client: httpx.Client, redis: RedisClient) -> None:
    NodeRegistry(redis).publish_model(card(loras=["ink"]))
    answer = client.post("/v1/jobs", json={"prompt": PROMPT, "loras": [{"name": "ink"}]})
    assert answer.status_code == 202
    expected = [{"name": "ink", "strength": 1.0, "expert": "both"}]
    assert answer.json()["request"]["loras"] == expected
    assert client.get(answer.json()["links"]["self"]).json()["request"]["loras"] == expected
    refused = client.post("/v1/jobs", json={"prompt": PROMPT, "loras": [{"name": "oil"}]})
    assert refused.status_code == 422
    assert refused.json()["errors"][0]["field"] == "loras.0.name"
    assert "ink" in refused.json()["errors"][0]["expected"]


def test_each_wrong_lora_is_named_by_its_place(client: httpx.Client, redis: RedisClient) -> None:
    NodeRegistry(redis).publish_model(card(loras=["ink"]))
    loras: list[object] = [
        {"name": "ink", "strength": 99},
        {"name": "ink"},
        {"name": "ink", "expert": "middle", "path": "/etc"},
        {"strength": 1},
        "ink",
    ]
    refused = client.post("/v1/jobs", json={"prompt": PROMPT, "loras": loras})
    assert refused.status_code == 422
    errors = {error["field"]: (error["got"], error["expected"]) for error in refused.json()["errors"]}
    assert errors == {
        "loras.0.strength": ("99", "a number from -10 to 10"),
        "loras.2.expert": ("middle", "one of both, high, low"),
        "loras.2.path": ("/etc", "no such field; known are expert, name, strength"),
        "loras.3.name": ("nothing", "a LoRA's name, as `GET /v1/models` lists them"),
        "loras.4": ("ink", errors["loras.4"][1]),
    }
    assert "strength" in errors["loras.4"][1]
    unknown = client.post("/v1/jobs", json={"prompt": PROMPT, "loras": [{"name": "oil"}, {"name": "chalk"}]})
    assert [error["field"] for error in unknown.json()["errors"]] == ["loras.0.name", "loras.1.name"]


PRESETS = [
    PresetCard(name="lossless"),
    PresetCard(name="8bit", summary="8 bits"),
    PresetCard(name="8bit-cache", refused="no calibrated settings"),
    PresetCard(name="draft", sampling_steps=2, guide_scale=(1.0, 1.0)),
]


def test_presets_are_listed_with_their_seconds_and_asked_for(
    client: httpx.Client, redis: RedisClient, store: JobStore, settings: Settings
) -> None:
    NodeRegistry(redis).publish_model(card(presets=PRESETS))
    asked = client.post("/v1/jobs", json={"prompt": PROMPT, "quality": "8bit"}).json()
    assert asked["request"]["quality"] == "8bit"
    draft = client.post("/v1/jobs", json={"prompt": PROMPT, "quality": "draft"}).json()["request"]
    assert (draft["sampling_steps"], draft["guide_scale"]) == (2, [1.0, 1.0])
    refused = client.post("/v1/jobs", json={"prompt": PROMPT, "quality": "8bit-cache"})
    assert refused.status_code == 422
    [error] = refused.json()["errors"]
    assert (error["field"], error["got"]) == ("quality", "'8bit-cache'")
    assert error["expected"] == "one of lossless, 8bit, draft; 8bit-cache: no calibrated settings"
    Timings(redis).learn(new_job().request, {"denoising": 8.0, "decoding": 2.0})
    fast = new_job().request.model_copy(update={"quality": "8bit"})
    Timings(redis).learn(fast, {"denoising": 3.0, "decoding": 2.0})
    listed = {preset["name"]: preset for preset in client.get("/v1/models").json()["data"][0]["presets"]}
    assert list(listed) == ["lossless", "8bit", "8bit-cache", "draft"]
    assert [listed[name]["expected_seconds"] for name in listed] == [10.0, 5.0, None, None]
    assert (listed["8bit-cache"]["offered"], listed["8bit-cache"]["reason"]) == (
        False,
        "no calibrated settings",
    )
    assert (listed["draft"]["offered"], listed["draft"]["reason"]) == (True, None)
    assert listed["draft"]["defaults"] == {"sampling_steps": 2, "guide_scale": [1.0, 1.0]}


def test_an_operator_forbids_presets(
    settings: Settings, client_for: Callable[..., httpx.Client], redis: RedisClient
) -> None:
    NodeRegistry(redis).publish_model(card(presets=PRESETS))
    strict = settings.model_copy(update={"forbidden_presets": "8bit, lossless"})
    with serve(strict) as strictly:
        client = client_for(url=strictly.url)
        for body in ({"quality": "8bit"}, {}):
            answer = client.post("/v1/jobs", json={"prompt": PROMPT, **body})
            assert answer.status_code == 422
            assert "forbidden by the operator" in answer.json()["errors"][0]["expected"]
        assert client.post("/v1/jobs", json={"prompt": PROMPT, "quality": "draft"}).status_code == 202
        presets = client.get("/v1/models").json()["data"][0]["presets"]
        assert [preset["offered"] for preset in presets] == [False, False, False, True]


def test_a_forbidden_preset_must_exist() -> None:
    with pytest.raises(ValidationError, match="got 2bit, expected some of lossless, 8bit"):
        Settings(forbidden_presets="8bit,2bit")


def test_submit_keeps_every_field(client: httpx.Client) -> None:
    sent = {
        "prompt": PROMPT,
        "negative_prompt": "blurry",
        "model": "tiny",
        "size": "128*96",
        "frame_num": 9,
        "shift": 3.5,
        "sampling_steps": 7,
        "guide_scale": 2.5,
        "seed": 42,
        "sample_solver": "dpm++",
    }
    extra = {"priority": "low", "deadline_seconds": 60, "webhook_events": ["job.failed", "job.started"]}
    job = client.post("/v1/jobs", json={**sent, **extra}).json()
    assert job["request"] == {
        **sent,
        "guide_scale": [2.5, 2.5],
        "image": None,
        "loras": [],
        "quality": "lossless",
    }
    assert job["priority"] == "low"
    assert job["webhook_events"] == ["job.failed", "job.started"]
    assert job["deadline_at"] is not None


def test_without_a_model_the_only_live_one_of_several_is_taken(
    client: httpx.Client, redis: RedisClient
) -> None:
    """A model whose nodes are gone keeps its card; it must not stand in the way of the one that is served."""
    nodes = NodeRegistry(redis)
    nodes.publish_model(card(name="wan"))
    refused = client.post("/v1/jobs", json={"prompt": PROMPT})
    assert refused.json()["errors"] == [{"field": "model", "got": "nothing", "expected": "one of tiny, wan"}]
    nodes.register(NodeInfo(id="a", model="wan", state="idle"))
    nodes.register(NodeInfo(id="b", model="tiny", state="draining"))
    assert submit(client)["request"]["model"] == "wan"  # type: ignore[index]
    assert client.post("/v1/videos", json={"prompt": PROMPT}).json()["model"] == "wan"
    nodes.beat("b", "busy")
    refused = client.post("/v1/jobs", json={"prompt": PROMPT})
    assert refused.json()["errors"] == [{"field": "model", "got": "nothing", "expected": "one of tiny, wan"}]


def test_the_operators_default_model(settings: Settings, redis: RedisClient, keys: KeyStore) -> None:
    """Is taken of several where a request names none; one that was never announced is named as missing."""
    NodeRegistry(redis).publish_model(card(name="other"))
    headers = {"Authorization": f"Bearer {keys.create('test')[1]}"}
    for default, status, said in (("other", 202, '"model":"other"'), ("gone", 422, '"got":"gone"')):
        with TestClient(create_app(settings.model_copy(update={"default_model": default}))) as client:
            answer = client.post("/v1/jobs", json={"prompt": PROMPT}, headers=headers)
        assert answer.status_code == status
        assert said in answer.text


def test_idempotency(client: httpx.Client, client_for: Callable[..., httpx.Client]) -> None:
    headers = {"Idempotency-Key": "order-1"}
    first = client.post("/v1/jobs", json={"prompt": PROMPT, "seed": 1}, headers=headers)
    again = client.post("/v1/jobs", json={"seed": 1, "prompt": PROMPT}, headers=headers)
    assert first.status_code == again.status_code == 202
    assert first.json()["id"] == again.json()["id"]
    assert "idempotent-replayed" not in first.headers
    assert again.headers["idempotent-replayed"] == "true"
    other = client.post("/v1/jobs", json={"prompt": PROMPT, "seed": 2}, headers=headers)
    assert other.status_code == 422
    assert other.json()["type"] == "/problems/idempotency-key-reused"
    stranger = client_for().post("/v1/jobs", json={"prompt": PROMPT, "seed": 1}, headers=headers)
    assert stranger.json()["id"] != first.json()["id"]
    for bad in ("x" * 256, "a b", ""):
        answer = client.post("/v1/jobs", json={"prompt": PROMPT}, headers={"Idempotency-Key": bad})
        assert answer.status_code == 422
        assert answer.json()["errors"][0]["field"] == "idempotency-key"


def test_a_repeat_is_not_checked_anew(
    client: httpx.Client, redis: RedisClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a resolver that fails nor a service without models takes away a job that was accepted."""
    headers = {"Idempotency-Key": "order-2"}
    body = {"prompt": PROMPT, "callback_url": "https://1.1.1.1/hook"}
    first = client.post("/v1/jobs", json=body, headers=headers)

    def refuse(*_: object, **__: object) -> None:
        raise CallbackRefused("a name that resolves")

    monkeypatch.setattr("api.submit.check_callback_url", refuse)
    redis.execute_command("DEL", "reel:models")
    assert client.post("/v1/jobs", json=body).status_code in (422, 503)
    again = client.post("/v1/jobs", json=body, headers=headers)
    assert (again.status_code, again.json()["id"]) == (202, first.json()["id"])
    assert again.headers["idempotent-replayed"] == "true"


def test_many_at_once_with_one_idempotency_key(client: httpx.Client) -> None:
    def send(_: int) -> str:
        answer = client.post("/v1/jobs", json={"prompt": PROMPT}, headers={"Idempotency-Key": "race"})
        return str(answer.json()["id"])

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(send, range(16)))) == 1


def test_outstanding_jobs_are_limited(client_for: Callable[..., httpx.Client]) -> None:
    client = client_for(max_outstanding=2)
    submit(client)
    submit(client)
    answer = client.post("/v1/jobs", json={"prompt": PROMPT})
    assert answer.status_code == 429
    assert answer.json()["type"] == "/problems/queue-full"
    assert int(answer.headers["retry-after"]) > 0

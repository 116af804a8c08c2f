"""``/metrics``: who may read it, and whether it says what the queue and the nodes are now."""

from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr

from api.app import create_app
from jobs.client import RedisClient
from jobs.nodes import NodeInfo, NodeRegistry
from jobs.settings import Settings
from jobs.store import JobStore
from tests.api.conftest import MODEL, submit


def samples(client: httpx.Client, name: str) -> dict[tuple[str, ...], float]:
    """A family's values by their labels' values, as Prometheus' own parser reads them."""
    text = client.get("/metrics").raise_for_status().text
    found = (one for family in text_string_to_metric_families(text) for one in family.samples)
    return {tuple(one.labels.values()): one.value for one in found if one.name == name}


def test_the_queue_as_it_is_now(client: httpx.Client, store: JobStore, redis: RedisClient) -> None:
    for _ in range(3):
        submit(client)
    assert store.claim(MODEL, "node-a") is not None
    jobs = samples(client, "reel_jobs")
    assert (jobs[MODEL, "normal", "queued"], jobs[MODEL, "normal", "running"]) == (2, 1)
    assert 0 < samples(client, "reel_queue_oldest_seconds")[MODEL, "normal"] < 60
    assert samples(client, "reel_store_up") == samples(client, "reel_storage_up") == {(): 1}
    redis.execute_command("FLUSHALL")
    assert samples(client, "reel_jobs") == {}, "a model that is gone leaves no old figures"


def test_a_node_that_fell_silent_counts_as_lost(client: httpx.Client, redis: RedisClient) -> None:
    registry = NodeRegistry(redis)
    for name in ("a", "b", "c"):
        registry.register(NodeInfo(id=name, model=MODEL, state="idle"))
    registry.beat("c", "busy", seen_at=1.0)
    nodes = samples(client, "reel_nodes")
    assert {state: count for state, count in nodes.items() if count} == {("idle",): 2, ("lost",): 1}


def test_a_repeat_is_not_a_second_job(client: httpx.Client) -> None:
    """Also one that overtakes the first between the look for it and its submit."""
    before = samples(client, "reel_jobs_submitted_total").get((MODEL, "normal"), 0)
    body, headers = {"prompt": "a red ball"}, {"Idempotency-Key": "one"}
    with ThreadPoolExecutor(8) as pool:
        sent = [pool.submit(client.post, "/v1/jobs", json=body, headers=headers) for _ in range(8)]
    assert {one.result().status_code for one in sent} == {202}
    assert samples(client, "reel_jobs_submitted_total")[MODEL, "normal"] == before + 1


@pytest.mark.parametrize(
    ("header", "status"),
    [(None, 401), ("Bearer wrong", 401), ("Bearer ", 401), ("Basic scrape", 401), ("Bearer scrape", 200)],
)
def test_a_token_closes_it(settings: Settings, header: str | None, status: int) -> None:
    """Its 401 is a problem like any other; the probes stay open."""
    closed = create_app(settings.model_copy(update={"metrics_token": SecretStr("scrape")}))
    client = TestClient(closed)
    answer = client.get("/metrics", headers={"Authorization": header} if header else {})
    assert answer.status_code == status
    if status == 401:
        assert answer.json()["type"] == "/problems/unauthenticated"
        assert "reel_" not in answer.text
    assert client.get("/healthz").status_code == 200

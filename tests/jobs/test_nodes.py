"""The node registry and the model cards."""

import pytest

from jobs.client import RedisClient
from jobs.nodes import NodeInfo, NodeRegistry
from tests.support.jobs import card


@pytest.fixture
def nodes(redis: RedisClient) -> NodeRegistry:
    return NodeRegistry(redis)


def test_a_node_s_life(nodes: NodeRegistry) -> None:
    first = nodes.register(NodeInfo(id="n1", model="tiny", ranks=8, labels={"cloud": "aws"}))
    assert nodes.beat("n1", "busy", "job_1", publishing_job_id="job_0")
    now = nodes.get("n1")
    assert now is not None
    assert (now.state, now.job_id, now.publishing_job_id) == ("busy", "job_1", "job_0")
    assert now.seen_at >= first.seen_at
    assert (now.started_at, now.labels) == (first.started_at, {"cloud": "aws"})
    nodes.register(NodeInfo(id="n0", model="tiny"))
    assert [node.id for node in nodes.list()] == ["n0", "n1"]
    nodes.remove("n1")
    assert [node.id for node in nodes.list()] == ["n0"]
    assert not nodes.beat("n1", "idle")


def test_a_silent_node_is_forgotten(nodes: NodeRegistry, redis: RedisClient) -> None:
    nodes.register(NodeInfo(id="n1", model="tiny"))
    assert 0 < redis.execute_command("TTL", "reel:node:n1") <= 60
    redis.execute_command("DEL", "reel:node:n1")  # as its TTL does
    assert nodes.list() == []
    assert redis.execute_command("KEYS", "*") == []


def test_draining_is_asked_for_through_redis(nodes: NodeRegistry) -> None:
    assert not nodes.request_drain("n1")
    nodes.register(NodeInfo(id="n1", model="tiny"))
    assert not nodes.drain_requested("n1")
    assert nodes.request_drain("n1")
    assert nodes.drain_requested("n1")
    nodes.beat("n1", "draining")
    assert nodes.list()[0].drain_requested
    nodes.cancel_drain("n1")
    assert not nodes.list()[0].drain_requested


def test_model_cards(nodes: NodeRegistry) -> None:
    nodes.publish_model(card(name="b"))
    nodes.publish_model(card(name="a"))
    nodes.publish_model(card(name="b", fps=24.0))
    assert [(model.name, model.fps) for model in nodes.models()] == [("a", 16.0), ("b", 24.0)]
    assert nodes.withdraw_model("a")
    assert not nodes.withdraw_model("a")
    assert [model.name for model in nodes.models()] == ["b"]

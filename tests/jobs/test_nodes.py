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


def test_a_wish_to_drain_ends_with_its_node_or_after_a_day(nodes: NodeRegistry, redis: RedisClient) -> None:
    started = nodes.register(NodeInfo(id="n1", model="tiny")).started_at
    assert nodes.request_drain("n1")
    assert 86_000 < redis.execute_command("TTL", "reel:drain:n1") <= 86_400
    again = nodes.register(NodeInfo(id="n1", model="tiny", started_at=started))  # it was silent for long
    assert (again.started_at, nodes.drain_requested("n1")) == (started, True)
    nodes.remove("n1")
    assert redis.execute_command("KEYS", "*") == []


def test_model_cards(nodes: NodeRegistry) -> None:
    nodes.publish_model(card(name="b"))
    nodes.publish_model(card(name="a"))
    nodes.publish_model(card(name="b", fps=24.0))
    assert [(model.name, model.fps) for model in nodes.models()] == [("a", 16.0), ("b", 24.0)]
    assert nodes.withdraw_model("a")
    assert not nodes.withdraw_model("a")
    assert [model.name for model in nodes.models()] == ["b"]


def test_a_model_is_retired_only_when_no_node_serves_it(nodes: NodeRegistry) -> None:
    nodes.publish_model(card(name="a"))
    for node_id, model in (("n1", "a"), ("n2", "b"), ("n3", "a")):
        nodes.register(NodeInfo(id=node_id, model=model, state="idle"))
    assert [node.id for node in nodes.retire_model("a")] == ["n1", "n3"]
    assert [model.name for model in nodes.models()] == ["a"]
    nodes.beat("n1", "stopped")
    nodes.remove("n3")
    assert nodes.retire_model("a") == []
    assert nodes.models() == []
    with pytest.raises(KeyError):
        nodes.retire_model("a")


def test_a_node_that_comes_while_its_model_is_retired_keeps_it(
    nodes: NodeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes.publish_model(card(name="a"))
    look = nodes.list

    def late() -> list[NodeInfo]:
        found = look()
        nodes.register(NodeInfo(id="n1", model="a", state="idle"))
        nodes.publish_model(card(name="a"))
        return found

    monkeypatch.setattr(nodes, "list", late)
    assert [node.id for node in nodes.retire_model("a")] == ["n1"]
    assert [model.name for model in nodes.models()] == ["a"]


def test_live_models_are_served_by_a_node_heard_of_lately(nodes: NodeRegistry, redis: RedisClient) -> None:
    for name in ("a", "b", "c", "e"):
        nodes.publish_model(card(name=name))
    states = {"a": "idle", "b": "busy", "c": "draining", "d": "idle"}  # d: no card
    for name, state in states.items():
        nodes.register(NodeInfo.model_validate({"id": name, "model": name, "state": state}))
    assert nodes.live_models(30.0) == {"a", "b"}
    old = nodes.get("b")
    assert old is not None
    redis.execute_command(
        "SET", "reel:node:b", old.model_copy(update={"seen_at": old.seen_at - 31}).model_dump_json()
    )
    assert nodes.live_models(30.0) == {"a"}

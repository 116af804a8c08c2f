"""`reel models`: which models are announced, who serves them, and withdrawing one that nobody serves."""

import json
from collections.abc import Iterator

import pytest

from jobs.client import RedisClient, connect
from jobs.nodes import NodeInfo, NodeRegistry
from jobs.settings import Settings, get_settings
from tests.support.cli import Reel, reel_group
from tests.support.jobs import card
from tests.support.redis import redis_server


@pytest.fixture
def redis(monkeypatch: pytest.MonkeyPatch) -> Iterator[RedisClient]:
    """A Redis that `reel` finds by its environment."""
    with redis_server() as server:
        monkeypatch.setenv("REEL_REDIS_URL", server.url)
        get_settings.cache_clear()
        client = connect(Settings(redis_url=server.url))
        yield client
        client.close()
        get_settings.cache_clear()


@pytest.fixture
def reel(redis: RedisClient, capsys: pytest.CaptureFixture[str]) -> Reel:
    """Runs `reel models ...` and gives what it printed."""
    return reel_group("models", capsys)


def test_a_model_is_listed_and_withdrawn_once_nobody_serves_it(reel: Reel, redis: RedisClient) -> None:
    nodes = NodeRegistry(redis)
    for name in ("demo", "wan"):
        nodes.publish_model(card(name=name))
    nodes.register(NodeInfo(id="n1", model="demo", state="idle"))
    nodes.register(NodeInfo(id="n2", model="demo", state="stopped"))
    assert [line.split() for line in reel().splitlines()] == [
        ["name", "task", "nodes"], ["demo", "t2v", "1"], ["wan", "t2v", "0"],
    ]  # fmt: skip
    assert [json.loads(line) for line in reel("--json").splitlines()] == [
        {"name": "demo", "task": "t2v", "nodes": 1}, {"name": "wan", "task": "t2v", "nodes": 0},
    ]  # fmt: skip

    assert reel("withdraw", "demo", code=1) == (
        "reel: demo is served by n1: drain them first (a node that died is forgotten after a minute)\n"
    )
    assert reel("withdraw", "nosuch", code=1) == "reel: no model 'nosuch'; there are: demo, wan\n"
    nodes.remove("n1")
    assert "demo is withdrawn" in reel("withdraw", "demo")
    assert [model.name for model in nodes.models()] == ["wan"]

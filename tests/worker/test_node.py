"""A node's beat: what it tells the registry, how it hears of a drain, and what follows after the grace."""

from types import SimpleNamespace
from typing import Any

import pytest

from jobs.client import connect
from jobs.nodes import NodeInfo, NodeRegistry
from jobs.settings import Settings
from tests.support.jobs import card
from worker import node
from worker.drain import Drain
from worker.vitals import Memory


class Ranks:
    """What the node asked of its ranks, in order."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def stop(self, why: str) -> None:
        self.asked.append(f"stop: {why}")

    def kill(self) -> None:
        self.asked.append("kill")


class Actor(SimpleNamespace):
    """The parts of a node actor that its beat looks at, over a real registry."""

    _beat, _announce, _enforce_drain, drain = (
        node.NodeActor._beat,
        node.NodeActor._announce,
        node.NodeActor._enforce_drain,
        node.NodeActor.drain,
    )


def job(name: str) -> Any:
    return SimpleNamespace(id=name)


@pytest.fixture
def registry(settings: Settings) -> NodeRegistry:
    return NodeRegistry(connect(settings))


@pytest.fixture
def actor(settings: Settings, registry: NodeRegistry) -> Any:
    return Actor(
        plan=SimpleNamespace(node_id="n1", settings=settings.model_copy(update={"drain_seconds": 40.0})),
        registry=registry,
        info=NodeInfo(id="n1", model="tiny", state="idle"),
        card=card(),
        loop=SimpleNamespace(job=None),
        publisher=SimpleNamespace(job=None, step_seconds=None),
        drain_wish=Drain(),
        group=Ranks(),
        meter=SimpleNamespace(latest=[]),
        _memory=None,
    )


def told(registry: NodeRegistry) -> NodeInfo:
    found = registry.get("n1")
    assert found is not None
    return found


def test_a_beat_says_what_the_node_does(actor: Any, registry: NodeRegistry) -> None:
    actor._announce()
    actor._beat()
    assert (told(registry).state, told(registry).job_id, told(registry).memory_used) == ("idle", None, None)
    actor.loop.job, actor.publisher.job, actor._memory = job("a"), job("b"), Memory(3, 9)
    actor._beat()
    seen = told(registry)
    assert (seen.state, seen.job_id, seen.publishing_job_id) == ("busy", "a", "b")
    assert (seen.memory_used, seen.memory_total) == (3, 9)
    actor.drain_wish.ask(60)
    actor._beat()
    assert (told(registry).state, told(registry).job_id) == ("draining", "a"), "nothing new, whatever runs"


def test_a_node_that_redis_forgot_announces_itself_and_its_model_again(
    actor: Any, registry: NodeRegistry
) -> None:
    assert registry.get("n1") is None
    actor._beat()
    assert told(registry).model == "tiny"
    assert [model.name for model in registry.models()] == ["tiny"]


def test_a_drain_asked_for_in_the_registry_starts_the_settings_grace_once(
    actor: Any, registry: NodeRegistry
) -> None:
    actor._announce()
    actor._beat()
    assert not actor.drain_wish.asked
    registry.request_drain("n1")
    actor._beat()
    assert actor.drain_wish.asked
    first = actor.drain_wish.overdue
    assert -40.0 <= first < -30.0
    actor._beat()  # the wish still stands there; a grace that began anew at every beat would never end
    assert actor.drain_wish.overdue >= first


def test_a_grace_is_shortened_and_never_lengthened() -> None:
    """A drain that was asked for in peace, then the cloud's notice, then the drain again."""
    wish = Drain()
    assert wish.overdue == float("-inf")
    wish.ask(600)
    wish.ask(20)
    wish.ask(600)
    assert -20 <= wish.overdue < -10


@pytest.mark.parametrize(
    ("overdue", "asked"),
    [
        (None, []),
        (-5.0, []),
        (1.0, ["stop: drain"]),
        (node.STOP_SECONDS - 1, ["stop: drain"]),
        (node.STOP_SECONDS + 1, ["kill"]),
    ],
    ids=["no drain", "within the grace", "just over", "still stopping", "does not stop"],
)
def test_the_ranks_are_stopped_after_the_grace_and_killed_a_little_later(
    actor: Any, overdue: float | None, asked: list[str]
) -> None:
    actor.loop.job = job("a")
    if overdue is not None:
        actor.drain_wish.ask(-overdue)
    actor._enforce_drain()
    assert actor.group.asked == asked


def test_ranks_without_a_job_are_let_alone(actor: Any) -> None:
    """They have nothing to stop; what is being published needs none of them."""
    actor.drain_wish.ask(-node.STOP_SECONDS - 1)
    actor._enforce_drain()
    assert actor.group.asked == []

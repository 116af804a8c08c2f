"""A node's health check: content with this container's own node, while it reports, and with no other."""

from collections.abc import Iterator

import pytest

from infra.docker import healthcheck
from jobs.client import connect
from jobs.nodes import NodeInfo, NodeRegistry
from jobs.settings import Settings
from tests.support.redis import redis_server


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[NodeRegistry]:
    """A Redis that the check finds by its environment, on the host `web-1`."""
    with redis_server() as server:
        monkeypatch.setenv("REEL_REDIS_URL", server.url)
        monkeypatch.setattr(healthcheck.socket, "gethostname", lambda: "web-1")
        client = connect(Settings(redis_url=server.url))
        yield NodeRegistry(client)
        client.close()


def test_a_node_is_known_by_its_host(registry: NodeRegistry) -> None:
    """And not by another's whose name begins alike."""
    registry.register(NodeInfo(id="web-10-abc123", model="tiny", host="web-10"))
    assert not healthcheck.node()
    registry.register(NodeInfo(id="web-1-abc123", model="tiny", host="web-1"))
    assert healthcheck.node()


def test_or_by_the_name_that_it_was_given(registry: NodeRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REEL_NODE_ID", "mine")
    registry.register(NodeInfo(id="other", model="tiny", host="web-1"))
    assert not healthcheck.node()
    registry.register(NodeInfo(id="mine", model="tiny", host="renamed"))
    assert healthcheck.node()


def test_a_node_that_hangs_is_not_healthy(registry: NodeRegistry) -> None:
    """Its entry stays for a minute; nobody else would start it again sooner."""
    seen = registry.register(NodeInfo(id="web-1-abc123", model="tiny", host="web-1"))
    for seconds, healthy in ((5, True), (16, False)):
        registry._write(seen.model_copy(update={"seen_at": seen.seen_at - seconds}))
        assert healthcheck.node() == healthy

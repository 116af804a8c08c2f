"""What a starting stack asks its parts: wrong answers would call it ready too soon, or never."""

import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from infra.local import LocalStack
from infra.ports import PortBlock
from infra.probes import http_ok, nodes_live, redis_answers
from infra.state import StackState
from jobs.client import connect
from jobs.keys import KeyStore
from jobs.nodes import NodeInfo, NodeRegistry, NodeState
from jobs.settings import Settings
from tests.support.jobs import card
from tests.support.redis import redis_server
from tests.support.serving import serving


@pytest.fixture
def settings() -> Iterator[Settings]:
    with redis_server() as server:
        yield Settings(redis_url=server.url)


@pytest.fixture
def nowhere() -> Iterator[Settings]:
    """A Redis that nobody runs."""
    block = PortBlock.claim()
    yield Settings(redis_url=f"redis://127.0.0.1:{block.ports[0]}/0", redis_timeout=1)
    block.release()


def test_a_node_is_live_when_it_takes_jobs_since_this_start(settings: Settings, nowhere: Settings) -> None:
    """A killed stack's entries stay for a minute, under the same names."""
    nodes, now = NodeRegistry(connect(settings)), time.time()

    def register(name: str, state: NodeState, started: float) -> None:
        nodes.register(NodeInfo(id=name, model="tiny", state=state, started_at=started))

    wanted = ["local-1", "local-2"]
    register("local-1", "idle", now + 1)
    register("local-2", "idle", now - 1)
    assert not nodes_live(settings, wanted, now)
    assert nodes_live(settings, wanted[:1], now)
    for state in ("starting", "draining", "stopped"):
        register("local-2", state, now + 1)
        assert not nodes_live(settings, wanted, now)
    register("local-2", "busy", now + 1)
    assert nodes_live(settings, wanted, now)
    assert not nodes_live(nowhere, wanted, now)


def test_redis_answers_or_not(settings: Settings, nowhere: Settings) -> None:
    assert redis_answers(settings)
    assert not redis_answers(nowhere)


def test_only_200_is_ready_and_no_proxy_is_asked(nowhere: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    class Ready(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(int(self.path[1:]))
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    dead = nowhere.redis_url.removeprefix("redis://").removesuffix("/0")
    monkeypatch.setenv("http_proxy", f"http://{dead}")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with serving(HTTPServer(("127.0.0.1", 0), Ready)) as server:
        url = f"http://127.0.0.1:{server.server_port}"
        assert [http_ok(f"{url}/{status}") for status in (200, 204, 503)] == [True, False, False]
    assert not http_ok(f"http://{dead}/200")


def test_a_stack_keeps_its_key_when_redis_lost_it_and_serves_its_own_model(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scripts and shells know the key from the last start; a model that went must not be the default."""
    monkeypatch.setattr(LocalStack, "settings", lambda self: settings)
    stack = object.__new__(LocalStack)
    stack.data_dir, stack.state = tmp_path, StackState()
    keys, nodes = KeyStore(connect(settings), stack.state.secret_key), NodeRegistry(connect(settings))
    stack._ensure_key()
    first = (stack.api_key, stack.webhook_secret)
    stack._ensure_key()
    assert len(keys.list()) == 1, "it is there already"
    connect(settings).execute_command("FLUSHALL")
    stack.state = StackState.load(tmp_path)
    assert (stack.api_key, stack.webhook_secret) == first
    stack._ensure_key()
    found = keys.authenticate(first[0])
    assert found is not None
    assert keys.webhook_secrets(found.id) == [first[1]]
    nodes.publish_model(card(name="old"))
    stack._forget_models()
    assert nodes.models() == []

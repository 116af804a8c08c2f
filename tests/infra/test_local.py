"""What the parts of a local stack are told: each its own, and nobody another's secrets."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from infra import local
from infra.errors import CliError
from infra.local import LocalConfig, LocalStack
from infra.ports import PortBlock
from infra.process import PartSpec
from infra.state import StackState


class Recorder:
    """In the supervisor's place: keeps what it was to start."""

    def __init__(self) -> None:
        self.parts: dict[str, PartSpec] = {}

    def add(self, spec: PartSpec) -> None:
        self.parts[spec.name] = spec


@pytest.fixture
def ports() -> Iterator[PortBlock]:
    block = PortBlock.claim()
    yield block
    block.release()


@pytest.fixture
def parts(ports: PortBlock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, PartSpec]:
    """The parts of a stack of two nodes, as a shell starts it that has read another stack's stack.env."""
    for name in local.SECRETS:
        monkeypatch.setenv(name, "another stack's")
    monkeypatch.setenv("NO_PROXY", "inside.example")
    monkeypatch.setattr(local, "gpus", lambda: ["0", "1", "2", "3", "4"])
    monkeypatch.setattr(LocalStack, "_forget_models", lambda self: None)
    state = StackState(api_key="rk_own", webhook_secret="whsec_own")
    recorder: Any = Recorder()
    LocalStack(LocalConfig(tmp_path, nodes=2, receiver=True), recorder, ports, state)._start_parts(tmp_path)
    parts: dict[str, PartSpec] = recorder.parts
    assert {*parts} == {"node-1", "node-2", "api", "celery-worker", "celery-beat", "receiver"}
    for part in parts.values():
        assert "another stack's" not in part.env.values(), part.name
        assert "rk_own" not in part.env.values(), part.name
    return parts


def test_only_who_checks_keys_or_signs_gets_the_secret_key(parts: dict[str, PartSpec]) -> None:
    holders = {
        secret: {name for name, part in parts.items() if secret in part.env} for secret in local.SECRETS
    }
    assert holders == {
        "REEL_SECRET_KEY": {"api", "celery-worker"},
        "REEL_WEBHOOK_SECRET": {"receiver"},
        "REEL_API_KEY": set(),
    }


def test_each_part_logs_in_as_its_own_role(parts: dict[str, PartSpec]) -> None:
    roles = {
        "node-1": "node",
        "node-2": "node",
        "api": "api",
        "celery-worker": "celery",
        "celery-beat": "celery",
    }
    for name, role in roles.items():
        env = parts[name].env
        assert env["REEL_REDIS_URL"].startswith(f"redis://{role}:"), name
        assert env["REEL_S3_ACCESS_KEY"] == role
    passwords = {parts[name].env["REEL_REDIS_URL"] for name in roles}
    assert len(passwords) == len({parts[name].env["REEL_S3_SECRET_KEY"] for name in roles}) == 3


def test_nodes_share_the_cards_and_give_back_what_runs(parts: dict[str, PartSpec]) -> None:
    """Each card has one node; SIGTERM would have Ctrl-C wait for a whole video."""
    first, second = parts["node-1"], parts["node-2"]
    shares = [part.env["CUDA_VISIBLE_DEVICES"].split(",") for part in (first, second)]
    assert sorted(shares[0] + shares[1]) == ["0", "1", "2", "3", "4"]
    assert all(shares)
    assert [part.env["REEL_NODE_ID"] for part in (first, second)] == ["local-1", "local-2"]
    assert first.stop_signal == second.stop_signal == signal.SIGINT


def test_more_nodes_than_cards_are_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node without a card would have found that out after the stores and the first node had started."""
    folder = tmp_path / "data"
    for cards, nodes, expected in (
        (["0"], 2, "got 2, expected 1 to 1: each node needs a GPU of its own, and 1 is visible"),
        (["4", "6"], 3, "got 3, expected 1 to 2: each node needs a GPU of its own, and 2 are visible"),
        (["0"], 0, "got 0, expected 1 to 1: each node needs"),
        ([], 0, "got 0, expected 1 or more"),
        ([], -1, "got -1, expected 1 or more"),
    ):
        monkeypatch.setattr(local, "gpus", lambda cards=cards: cards)
        config = LocalConfig(folder, nodes=nodes)
        with pytest.raises(CliError, match=f"--nodes: {expected}"), local.running(config, print):
            pytest.fail("it started")
        assert not folder.exists()


def test_what_talks_to_other_parts_stops_before_them(parts: dict[str, PartSpec]) -> None:
    """The API and nodes first: webhooks of their last events still find a sender, and that its receiver."""
    order = {name: part.stop_order for name, part in parts.items()}
    assert order["node-1"] == order["api"] < order["celery-worker"] < order["receiver"]


def test_loopback_needs_no_proxy(parts: dict[str, PartSpec]) -> None:
    for part in parts.values():
        assert part.env["NO_PROXY"] == part.env["no_proxy"] == "inside.example,127.0.0.1,localhost"


def test_the_apis_port(ports: PortBlock, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that was asked for or none; by default 8080, or a spare one beside a stack that has it."""
    spare, taken = ports.ports[0], ports.base
    assert local._choose_api_port(ports.ports[1], spare) == ports.ports[1]
    with pytest.raises(CliError, match=f"port {taken} is taken"):
        local._choose_api_port(taken, spare)
    monkeypatch.setattr(local, "DEFAULT_PORT", taken)
    assert local._choose_api_port(None, spare) == spare
    assert local._choose_api_port(0, spare) == spare
    monkeypatch.setattr(local, "DEFAULT_PORT", ports.ports[2])
    assert local._choose_api_port(None, spare) == ports.ports[2]

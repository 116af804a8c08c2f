"""A local stack's memory: secrets, ports, lock, and the file for other shells."""

import os
import stat
from pathlib import Path

import pytest

from infra.errors import CliError
from infra.ports import BLOCK, PortBlock, is_free
from infra.stack_env import use_stack, write_stack_env
from infra.state import StackState, lock_data_dir, write_private


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_state_survives_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    state = StackState.load(tmp_path)
    state.api_key, state.port_base = "rk_1", 20_000
    state.save(tmp_path)
    assert StackState.load(tmp_path) == state
    assert mode(tmp_path / "stack.json") == 0o600
    secrets = [state.secret_key, *state.redis_passwords.values(), *state.s3_secrets.values()]
    assert len(set(secrets)) == len(secrets) == 10  # nine roles' and the service's
    assert StackState.load(tmp_path / "other").secret_key != state.secret_key


def test_a_state_of_another_version_is_read(tmp_path: Path) -> None:
    text = '{"secret_key": "s", "from_the_future": 1, "redis_passwords": {"node": "p"}, "s3_secrets": {}}'
    write_private(tmp_path / "stack.json", text)
    state = StackState.load(tmp_path)
    assert state.secret_key == "s"
    assert state.redis_passwords["node"] == "p"
    assert state.redis_passwords["scaler"]  # a role that came later
    assert state.s3_secrets["node"]


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    (tmp_path / "stack.json").write_text("{")
    with pytest.raises(CliError, match=r"stack\.json cannot be read"):
        StackState.load(tmp_path)


def test_a_private_file_replaces_an_open_one(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_text("old")
    path.chmod(0o644)
    write_private(path, "new")
    assert path.read_text() == "new"
    assert mode(path) == 0o600


def test_the_lock_is_exclusive_and_names_its_owner(tmp_path: Path) -> None:
    first = lock_data_dir(tmp_path)
    try:
        assert mode(tmp_path) == 0o700
        with pytest.raises(CliError, match=f"in use by another stack \\(pid {os.getpid()}\\)"):
            lock_data_dir(tmp_path)
    finally:
        os.close(first)
    os.close(lock_data_dir(tmp_path))


def test_a_data_dir_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CliError, match="cannot be used"):
        lock_data_dir(tmp_path / "file" / "data")


def test_port_blocks_never_overlap_and_come_back() -> None:
    first = PortBlock.claim()
    second = PortBlock.claim(first.base)  # wanted, but taken
    try:
        assert not set(first.ports) & set(second.ports)
        assert len(first.ports) == BLOCK - 1
        assert not is_free(first.base)
        assert all(is_free(port) for port in first.ports)
    finally:
        first.release()
        second.release()
    again = PortBlock.claim(first.base)
    again.release()
    assert again.base == first.base


def test_other_shells_find_the_stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("REEL_API_URL", "REEL_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    stack = tmp_path / ".reel" / "up"
    stack.mkdir(parents=True)
    write_stack_env(stack, {"REEL_API_URL": "http://here", "REEL_API_KEY": "it's a key"})
    assert mode(stack / "stack.env") == 0o600
    monkeypatch.setenv("REEL_API_KEY", "mine")
    use_stack(None, "REEL_API_KEY")
    assert "REEL_API_URL" not in os.environ, "an environment that speaks for itself is left alone"
    use_stack(stack)
    assert (os.environ["REEL_API_URL"], os.environ["REEL_API_KEY"]) == ("http://here", "it's a key")
    with pytest.raises(CliError, match=r"has no stack\.env"):
        use_stack(tmp_path / "nowhere")


def test_a_stack_that_is_only_found_here_fills_in_what_the_shell_does_not_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is named with --stack is meant as a whole."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("REEL_API_KEY", raising=False)
    monkeypatch.setenv("REEL_API_URL", "http://chosen")
    stack = tmp_path / ".reel" / "up"
    stack.mkdir(parents=True)
    write_stack_env(stack, {"REEL_API_URL": "http://here", "REEL_API_KEY": "here"})
    use_stack(None, "REEL_API_KEY")
    assert (os.environ["REEL_API_URL"], os.environ["REEL_API_KEY"]) == ("http://chosen", "here")
    use_stack(Path(".reel/up"))
    assert os.environ["REEL_API_URL"] == "http://here"
    monkeypatch.delenv("REEL_API_KEY")

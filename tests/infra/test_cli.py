"""`reel`: help, flags, and one clear line for everything that is not there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from api.inputs import JobIn
from infra.cli import invoke
from infra.commands.fields import parse_guide_scale, parse_size
from infra.errors import CliError
from infra.ports import PortBlock
from jobs.requests import VideoRequestIn
from jobs.settings import Settings, get_settings
from worker.build import build
from worker.plan import NodePlan

COMMANDS = (
    "up", "demo", "generate", "run", "make-tiny", "api", "node", "celery", "jobs", "nodes", "drain", "keys",
    "models", "dead", "listen", "bench",
)  # fmt: skip


def reel(*args: str, cwd: Path | None = None, **env: str) -> "subprocess.Popen[str]":
    """A real `reel` process."""
    return subprocess.Popen(
        [sys.executable, "-m", "infra.cli", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env={**os.environ, **env},
    )


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["--help"]) == 0
    shown = capsys.readouterr().out
    assert [name for name in COMMANDS if f" {name} " not in shown] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke([command, "--help"]) == 0
    assert "Usage: reel" in capsys.readouterr().out


def test_help_loads_no_heavy_library() -> None:
    heavy = (
        "torch",
        "ray",
        "celery",
        "redis",
        "boto3",
        "httpx",
        "fastapi",
        "pydantic",
        "transformers",
        "numpy",
    )
    code = (
        "import sys; from infra.cli import invoke; invoke(['--help'])\n"
        f"sys.exit(' '.join(name for name in {heavy} if name in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def flags(command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "300")
    assert invoke([command, "--help"]) == 0
    return capsys.readouterr().out


def test_every_request_field_is_a_flag(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    generate, run = flags("generate", capsys, monkeypatch), flags("run", capsys, monkeypatch)
    renamed = {"webhook_events": "webhook-event"}  # one flag an event
    for field in set(JobIn.model_fields) - {"prompt"}:
        assert f"--{renamed.get(field, field).replace('_', '-')} " in generate, field
    for field in set(VideoRequestIn.model_fields) - {"prompt"}:
        assert f"--{field.replace('_', '-')} " in run, field


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["nosuch"], "No such command 'nosuch'"),
        (["generate"], "Missing argument"),
        (["generate", "a cat", "--sampling-steps", "many"], "should be a valid integer"),
        (["generate", "a cat", "--sample-solver", "euler"], "'euler' is not one of"),
        (["up", "--data"], "requires an argument"),
        (["jobs", "--state", "done", "--stack", "."], "has no stack.env"),
        (["drain"], "Missing argument"),
        (["bench", "nosuch"], "no benchmark 'nosuch'"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_1(
    args: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert invoke(args) == 1
    shown = capsys.readouterr()
    assert words in shown.err
    assert shown.err.startswith("reel: ")
    assert shown.err.count("\n") == 1
    assert shown.out == ""


def test_parts_and_operators_say_in_one_line_what_cannot_be_reached(tmp_path: Path) -> None:
    ports = PortBlock.claim()
    nobody = ports.ports[0]  # guarded, and nobody listens
    env = {
        "REEL_REDIS_URL": f"redis://:secret@127.0.0.1:{nobody}/0",
        "REEL_S3_ENDPOINT": f"http://127.0.0.1:{nobody}",
        "REEL_SECRET_KEY": "0123456789abcdef0123456789abcdef",
        "REEL_API_URL": f"http://127.0.0.1:{nobody}",
        "REEL_API_KEY": "rk_none",
        "REEL_REDIS_TIMEOUT": "1",
        "REEL_START_SECONDS": "0",
    }
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "models_t5_tiny.pth").touch()
    cases = {
        ("api",): "Redis",
        ("node", "--model", str(tmp_path / "model")): "Redis",
        ("node", "--model", str(tmp_path / "nowhere")): "does not exist",
        ("celery", "worker"): "Redis",
        ("celery", "beat"): "Redis",
        ("jobs",): "Redis",
        ("nodes",): "Redis",
        ("models",): "Redis",
        ("models", "withdraw", "demo"): "Redis",
        ("keys", "list"): "Redis",
        ("dead", "list"): "Redis",
        ("generate", "a small cat on a mat"): "the API at",
        ("up", "--model", str(tmp_path / "nowhere"), "--data", str(tmp_path / "data")): "does not exist",
    }
    try:
        running = {case: reel(*case, cwd=tmp_path, **env) for case in cases}
        answers = {case: process.communicate(timeout=120) for case, process in running.items()}
        for case, (out, err) in answers.items():
            said = [line for line in err.splitlines() if line]
            assert running[case].returncode == 1, (case, err)
            assert cases[case] in said[-1], (case, err)
            assert "Traceback" not in err, (case, err)
            assert "secret" not in err, (case, err)
            assert len(said) == 1, (case, err)
            assert out == ""
    finally:
        ports.release()


def test_wrong_settings_are_named(tmp_path: Path) -> None:
    process = reel("api", cwd=tmp_path, REEL_LEASE_SECONDS="soon")
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert "REEL_LEASE_SECONDS" in err
    assert "'soon'" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "value"), [(None, None), ("5", 5.0), ("3.0,4.0", (3.0, 4.0)), (" 3 , 4 ", (3.0, 4.0))]
)
def test_guide_scale(text: str | None, value: object) -> None:
    assert parse_guide_scale(text) == value


@pytest.mark.parametrize("text", ["", "a", "1,2,3", "1,", ","])
def test_wrong_guide_scale_is_refused(text: str) -> None:
    with pytest.raises(CliError, match="--guide-scale"):
        parse_guide_scale(text)


@pytest.mark.parametrize(
    ("text", "value"), [("1280*720", (1280, 720)), ("832x480", (832, 480)), (None, None)]
)
def test_size(text: str | None, value: object) -> None:
    assert parse_size(text) == value


@pytest.mark.parametrize("text", ["", "1280", "1280*", "*720", "a*b", "1*2*3", "-1*2"])
def test_wrong_size_is_refused(text: str) -> None:
    with pytest.raises(CliError, match="--size"):
        parse_size(text)


def test_make_tiny_refuses_a_folder_with_something_in_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "precious").touch()
    assert invoke(["make-tiny", str(tmp_path)]) == 1
    assert "not an empty folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "environment", "weights"),
    [([], {}, "full"), (["--name", "own"], {"REEL_WEIGHTS": "8bit"}, "8bit"),
     (["--weights", "8bit", "--name", "own"], {}, "8bit"),
     (["--weights", "full"], {"REEL_WEIGHTS": "8bit"}, "full")],
)  # fmt: skip
def test_a_node_is_told_which_weights_to_hold(
    flags: list[str],
    environment: dict[str, str],
    weights: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the flag, else the setting; and what a rank loads is what its node was told."""
    (tmp_path / "model_index.json").write_text("{}")
    told: list[Settings] = []
    monkeypatch.setattr("worker.serve.run_node", lambda settings, model, name: told.append(settings) or 0)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    get_settings.cache_clear()
    try:
        assert invoke(["node", "--model", str(tmp_path), *flags]) == 0
    finally:
        get_settings.cache_clear()
    assert [settings.weights for settings in told] == [weights]
    loaded: list[object] = []
    monkeypatch.setattr("engine.load.load_pipeline", lambda model, **more: loaded.append(more["weights"]))
    settings = told[0].model_copy(update={"warm_up": False})
    plan = NodePlan(
        settings=settings, model=tmp_path, name=None, node_id="n", ranks=1, device="cpu",
        threads=torch.get_num_threads(), run_dir=tmp_path, work_dir=tmp_path,
    )  # fmt: skip
    build(plan, 0, tmp_path / "meeting")
    assert loaded == [weights]


@pytest.mark.parametrize(("flags", "setting"), [(["--weights", "8bit"], "full"), ([], "8bit")])
def test_a_node_of_8_bit_weights_has_a_name_of_its_own(
    flags: list[str],
    setting: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Under the model's own it would claim lossless jobs, and fail each of them."""
    monkeypatch.setattr("worker.serve.run_node", lambda *_: pytest.fail("it started"))
    monkeypatch.setenv("REEL_WEIGHTS", setting)
    get_settings.cache_clear()
    try:
        assert invoke(["node", "--model", str(tmp_path), *flags]) == 1
    finally:
        get_settings.cache_clear()
    assert f"--name {tmp_path.name}-8bit" in capsys.readouterr().err


def test_weights_are_full_or_8bit(capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["node", "--model", ".", "--weights", "4bit"]) != 0
    assert "'full', '8bit'" in capsys.readouterr().err

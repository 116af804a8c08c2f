"""The SkyPilot task: loaded and planned by SkyPilot itself, in its own environment (scripts/skypilot.sh)."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
TASK = ROOT / "infra/skypilot/node.yaml"
PYTHON = ROOT / ".skypilot/bin/python"


def plan(task: Path, *clouds: str) -> Any:
    """What SkyPilot's parser and, with `clouds` enabled, its optimizer say. Its own words when it refuses."""
    if not PYTHON.exists():
        if os.environ.get("REEL_TEST_TOOLS") == "required":
            pytest.fail("no SkyPilot: scripts/skypilot.sh installs it")
        pytest.skip("no SkyPilot here: scripts/skypilot.sh installs it (a minute); CI does")
    program = Path(__file__).with_name("skypilot_plan.py")
    done = subprocess.run(
        [str(PYTHON), str(program), str(task), *clouds], capture_output=True, text=True, check=False, cwd=ROOT
    )
    if done.returncode:
        raise ValueError(done.stderr[-2000:])
    return json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith('{"read"')))


def test_its_own_parser_and_optimizer_take_the_task() -> None:
    """Spot in one cloud when it is the cheapest; another cloud and on-demand when that one has none."""
    both = plan(TASK, "lambda", "nebius", "runpod")
    assert (both["read"]["name"], both["read"]["nodes"]) == ("reel-node", 1)  # one node: its own Ray
    wanted = sorted([gpu, 8, spot] for gpu in ("B200", "H100", "H200") for spot in (False, True))
    assert both["read"]["offers"] == wanted
    assert both["rented"] == {"cloud": "Nebius", "gpus": {"H200": 8}, "spot": True, "price": 14.0}
    assert "REEL_REDIS_URL" in both["read"]["secrets"]
    elsewhere = plan(TASK, "lambda", "runpod")["rented"]
    assert elsewhere == {"cloud": "Lambda", "gpus": {"H100": 8}, "spot": False, "price": 24.0}


def test_it_refuses_a_tampered_task(tmp_path: Path) -> None:
    (tmp_path / "node.yaml").write_text(TASK.read_text().replace("use_spot", "use_spott"))
    with pytest.raises(ValueError, match="use_spott"):
        plan(tmp_path / "node.yaml")


def test_its_settings_are_ours_and_its_scripts_parse() -> None:
    """What SkyPilot can't know; and, without it, that the task names its GPUs."""
    task = yaml.safe_load(TASK.read_text())
    offers = task["resources"]["any_of"]
    assert {offer["accelerators"] for offer in offers} == {"H100:8", "H200:8", "B200:8"}
    assert {offer["use_spot"] for offer in offers} == {True, False}
    for name in {**task["envs"], **task["secrets"]}:
        field = name.removeprefix("REEL_").lower()
        assert field in Settings.model_fields or name in ("REEL_MODEL", "REEL_MODEL_SOURCE")
    subprocess.run(["bash", "-n"], input=task["setup"] + task["run"], text=True, check=True)


def test_the_driver_and_the_environment_name_the_same_version() -> None:
    pins = (ROOT / "infra/skypilot/requirements.txt").read_text()
    driver = (ROOT / "infra/scaler/drivers/skypilot.py").read_text()
    assert "\nskypilot==0.14.1\n" in pins
    assert "0.14.1" in driver

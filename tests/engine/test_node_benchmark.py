"""The node benchmark and the cold start, rehearsed on CPU ranks; what must stop them does."""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks import _node_parts as parts
from benchmarks import cold_start, node
from benchmarks._book import Book
from benchmarks._expected import step_seconds, sustained_seconds, warm_up_seconds
from benchmarks._official_step import OfficialStep
from benchmarks._verify import WrongResult, relative_error
from engine.attention import sdpa
from engine.parallel.mesh import Mesh
from tests.engine.ranks import environment

CPU = torch.device("cpu")


def rehearse(module: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", *arguments],
        env=environment() | {"REEL_TRANSPORT": "shared"},
        capture_output=True, text=True, timeout=150, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.timeout(300)
def test_a_rehearsal_gives_every_figure(tmp_path: Path) -> None:
    """Two ranks: parity, the official steps, steps with and without transfers, a video of each layout."""
    path = tmp_path / "node.json"
    words = ["--device", "cpu", "--gpus", "2", "--seconds", "0.01", "--videos", "1", "--sampling-steps", "2"]
    said = rehearse("node", *words, "--json", str(path))
    data = json.loads(path.read_text())
    assert (data["gpus"], data["model"], data["sampling_steps"]) == (2, "T2V-A14B", 2)
    assert set(data["parity"]) == {"two runs on one rank", "2x1", "1x2"}
    assert all(error < 1e-4 for error in data["parity"].values())
    assert data["official"]["SDPA"]["ms"] > 0
    assert 0 < data["official"]["SDPA"]["relative_error"] < parts.OFFICIAL_ERROR
    for layout in ("2x1", "1x2"):
        assert set(data[f"steps {layout}"]) == {"high", "low"}
        assert all(row["ms"] > 0 for row in data[f"steps {layout}"].values())
        video = data[f"video {layout} 0"]
        phases = video["seconds"]
        assert phases["total"] > phases["denoising"] + phases["decoding"] > 0
        assert (video["prompt_characters"], video["steps_computed"]) == (512, 2)
        assert video["mp4_bytes"] > 1000
        assert f"| {layout}, median of 1 videos |" in said
    row = data["steps 1x2"]["low"]
    assert row["exposed_ms"] == pytest.approx(row["ms"] - row["without_transfers_ms"])


def test_a_cold_start_writes_loads_and_serves(
    world_of_one: dist.ProcessGroup,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """All but torchrun: a checkpoint is written, forgotten by the page cache, loaded, warmed, served."""

    def here(command: list[str], **_: Any) -> None:
        cold_start.main(command[command.index("benchmarks.cold_start") + 1 :])

    monkeypatch.setattr(cold_start.subprocess, "run", here)
    monkeypatch.setattr(Mesh, "close", lambda self: None)  # the world is the fixture's
    cold_start.main(["--tiny", "--gpus", "1", "--folder", str(tmp_path / "w"), "--sampling-steps", "1"])
    found = json.loads(capsys.readouterr().out)
    assert found["written"]["gigabytes"] > 0
    times = found["cold"]["seconds_to"]
    assert [*times] == ["ranks joined", "loaded", "warm", "first video"]
    assert [*times.values()] == sorted(times.values())
    assert found["cold"]["video"]["steps"] == 1
    if not found["in_memory"]:
        assert found["cold"]["share_in_page_cache"] == 0


@pytest.fixture
def alone(world_of_one: dist.ProcessGroup) -> parts.Node:
    """The rehearsal's model in this process."""
    return parts.Node("A14B", CPU, {}, tiny=True)


def test_the_official_step_is_ours_but_for_rounding(alone: parts.Node) -> None:
    steps = parts.Steps(alone, None, None)
    with torch.inference_mode():
        want = steps.ours(alone.pipeline, "low")()
        got = steps.official("low", sdpa)()
        model = steps.experts()["low"]
        other = OfficialStep(model, steps.grid(model), sdpa, CPU, None)
        texts = model.encode_text(steps.text_2TE)
        wrong = other(steps.image.model_input(steps.latents), 501, texts, steps.guide)
    assert got.shape == want.shape
    assert relative_error(got, want) < 0.01
    assert relative_error(wrong, want) > 2 * relative_error(got, want)  # a timestep off is seen


def test_a_layout_that_is_off_ends_the_run(alone: parts.Node, monkeypatch: pytest.MonkeyPatch) -> None:
    right = parts.latents_of

    def wrong(one: parts.Node, layout: str, request: Any) -> torch.Tensor:
        return right(one, "1x1", request) * (1.001 if layout == "1x8" else 1.0)

    monkeypatch.setattr(parts, "latents_of", wrong)
    size = alone.pipeline.spec.sizes[-1]
    assert parts.parity(alone, ["1x1"], 1, 5, size)["1x1"] == 0
    with pytest.raises(WrongResult, match=r"1x8: latents are 0\.001"):
        parts.parity(alone, ["1x8"], 1, 5, size)


def test_parts_that_are_there_or_too_long_are_not_run(
    world_of_one: dist.ProcessGroup, tmp_path: Path
) -> None:
    """A resumed run keeps what it has; what would not end in time is left for the next one."""
    path = tmp_path / "node.json"
    path.write_text(json.dumps({"official": {"kept": 1}}))
    run = node.Run.__new__(node.Run)
    run.arguments, run.device = argparse.Namespace(videos=2), CPU
    run.book = Book(path, resume=True, budget=60, started=time.time())
    ran: list[str] = []
    run.part("official", 1, lambda: ran.append("official"))
    run.part("too long", 61, lambda: ran.append("too long"))
    run.part("short", 1, lambda: ran.append("short") or {"ms": 1})  # type: ignore[func-returns-value]
    assert ran == ["short"]
    kept = {"official": {"kept": 1}, "postponed": ["too long"], "short": {"ms": 1}}
    assert json.loads(path.read_text()) == kept


def test_a_video_is_guessed_from_what_is_known() -> None:
    run = node.Run.__new__(node.Run)
    run.book = Book(None, resume=False, budget=60, started=0)
    run.book.data |= {"gpus": 8, "sampling_steps": 40}
    unknown = run.guess("2x4")
    assert 60 < unknown < 200
    run.book.data["steps 2x4"] = {"high": {"ms": 1000.0}, "low": {"ms": 2000.0}}
    assert run.guess("2x4") == pytest.approx(1.1 * 80 + 15)
    run.book.data["video 2x4 0"] = {"seconds": {"total": 100.0}}
    assert run.guess("2x4") == pytest.approx(110)


def test_prompts_have_the_asked_length() -> None:
    assert [len(parts.prompt_of(characters)) for characters in (32, 128, 512)] == [32, 128, 512]
    assert node.default_layouts(8) == ["1x8", "2x4"]
    assert node.default_layouts(2) == ["2x1", "1x2"]
    assert node.default_layouts(3) == ["1x3"]
    assert node.default_layouts(1) == ["1x1"]


def test_what_a_part_will_take_is_near_what_it_took_on_a_gpu(alone: parts.Node) -> None:
    """One H200: steps of 480p and 720p as docs/log.md has them, and the 97 s that 480p's part took."""
    config = parts.FULL["A14B"].dit
    small = step_seconds(config, 21 * 30 * 52, gpus=1)
    assert small == pytest.approx(4.758, rel=0.2)
    assert step_seconds(config, 21 * 45 * 80, gpus=1) == pytest.approx(18.87, rel=0.2)
    took = sustained_seconds(4.758, 4.0, profiled=False) + 5 * 4.758  # a profile was of 5 steps then
    assert 2 * took == pytest.approx(97, rel=0.1)
    assert 8 * step_seconds(config, 75600, gpus=8) == pytest.approx(step_seconds(config, 75600, gpus=1))
    tokens = [5 * 3 * 3, 3 * 3]  # of the rehearsal's two sizes, at 3 latent frames
    steps = sum(2 * step_seconds(alone.shape.dit, one, gpus=1) for one in tokens)
    assert warm_up_seconds(alone.pipeline, alone.shape.dit, gpus=1) == pytest.approx(20 + steps, rel=1e-12)

"""The node benchmark and the cold start, rehearsed on CPU ranks; what must stop them does."""

import argparse
import gc
import json
import subprocess
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks import _node_parts as parts
from benchmarks import cold_start, node
from benchmarks._book import Book, check_place
from benchmarks._expected import step_seconds, sustained_seconds, warm_up_seconds
from benchmarks._node_model import Node, prompt_of
from benchmarks._official_step import OfficialStep
from benchmarks._random_model import FULL
from benchmarks._verify import WrongResult, relative_error
from engine.attention import sdpa
from engine.eight_bit_mode import EightBitMode
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
    assert data["official"]["SDPA"]["ms"] > 0
    assert 0 < data["official"]["SDPA"]["relative_error"] < parts.OFFICIAL_ERROR
    for layout in ("2x1", "1x2"):
        assert set(data[f"parity {layout}"]) == {"two runs on one rank", layout}
        assert all(error < 1e-4 for error in data[f"parity {layout}"].values())
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


@pytest.mark.parametrize("model", ["A14B", "I2V", "5B"])
def test_a_cold_start_writes_loads_and_serves(
    world_of_one: dist.ProcessGroup,
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """All but torchrun: a checkpoint is written, forgotten by the page cache, loaded, warmed, served."""

    def here(command: list[str], **_: Any) -> None:
        cold_start.main(command[command.index("benchmarks.cold_start") + 1 :])

    monkeypatch.setattr(cold_start.subprocess, "run", here)
    monkeypatch.setattr(Mesh, "close", lambda self: None)  # the world is the fixture's
    words = ["--tiny", "--gpus", "1", "--folder", str(tmp_path / "w"), "--sampling-steps", "1"]
    cold_start.main([*words, "--model", model])
    found = json.loads(capsys.readouterr().out)
    assert found["written"]["gigabytes"] > 0
    assert model in found["model"]
    times = found["cold"]["seconds_to"]
    assert [*times] == ["ranks joined", "loaded", "warm", "first video"]
    assert [*times.values()] == sorted(times.values())
    assert found["cold"]["video"]["steps"] == 1
    with pytest.raises(SystemExit, match="name another folder"):
        cold_start.main([*words, "--model", "A14B" if model == "5B" else "5B"])
    if not found["in_memory"]:
        assert found["cold"]["share_in_page_cache"] == 0


@pytest.fixture
def alone(world_of_one: dist.ProcessGroup) -> Node:
    """The rehearsal's model in this process."""
    one = Node("A14B", CPU, {"8bit": {"keep_blocks": []}}, tiny=True)
    one.make()
    return one


def test_a_layouts_quantised_weights_go_before_the_nexts_come(
    alone: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A set of an A14B is 22 GiB, and a run changes its layout six times."""
    monkeypatch.setattr(Node, "_join", lambda self, layout: Mesh.single())
    mode = weakref.ref(alone.pipeline.eight)
    assert len(alone.pipeline.eight.blocks._weights) == 4
    sets: list[bool] = []
    keep = EightBitMode.keep

    def kept(self: EightBitMode, *rest: Any) -> None:
        sets.append(mode() is None)
        keep(self, *rest)

    monkeypatch.setattr(EightBitMode, "keep", kept)
    gc.disable()
    try:
        alone.on("2x1")
    finally:
        gc.enable()
    assert sets == [True]


def test_the_official_step_is_left_out_where_it_has_no_room(
    alone: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As beside an A14B on two GPUs of 80 GB; the table says so and has all the rest."""
    steps = parts.Steps(alone, None, None)
    monkeypatch.setattr(parts, "free_bytes", lambda device: 2.0 * 2**30)
    found = parts.time_official(alone, steps, 0.01)
    assert found == {"skipped": "it needs 2.0 GiB beside our weights, 2.0 are free"}
    facts = {"model": "A14B", "size": [16, 48], "frame_num": 9, "sampling_steps": 2, "quality": "lossless"}
    said = node.table(facts | {"gpus": 2, "device": "CPU", "memory": {"rung": "resident"}, "official": found})
    assert "official: not run, it needs 2.0 GiB" in said
    assert parts.official_bytes(75_600, 5120, 2) == pytest.approx((16.6 + 2) * 2**30, rel=0.01)


def test_the_official_step_is_ours_but_for_rounding(alone: Node) -> None:
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


def test_a_layout_that_is_off_ends_the_run(alone: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    right = parts.latents_of

    def wrong(one: Node, layout: str, request: Any) -> torch.Tensor:
        return right(one, "1x1", request) * (1.001 if layout == "1x8" else 1.0)

    monkeypatch.setattr(parts, "latents_of", wrong)
    size = alone.pipeline.spec.sizes[-1]
    assert parts.parity(alone, "1x1", 1, 5, size)["1x1"] == 0
    with pytest.raises(WrongResult, match=r"1x8: latents are 0\.001"):
        parts.parity(alone, "1x8", 1, 5, size)


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


def test_no_video_is_made_cold(world_of_one: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that goes on warms up anew; without time for that, no video begins."""
    run = node.Run.__new__(node.Run)
    run.arguments, run.device, run.warm = argparse.Namespace(videos=2), CPU, set()
    run.book = Book(None, resume=True, budget=100, started=time.time())
    run.book.data |= {
        "sampling_steps": 2,
        "warm-up 1x1": {"seconds": 9},
        "video 1x1 0": {"seconds": {"total": 9}},
    }
    run.node = SimpleNamespace(on=lambda layout: layout, pipeline=None, world=1, shape=FULL["A14B"])  # type: ignore[assignment]
    did: list[str] = []
    monkeypatch.setattr(node, "warm_up", lambda pipeline: did.append(f"warm {pipeline}"))
    monkeypatch.setattr(node.Run, "request", lambda self, steps, number: number)
    monkeypatch.setattr(parts, "video", lambda on, number: did.append(f"video {number}") or {})  # type: ignore[func-returns-value]
    monkeypatch.setattr(node, "warm_up_seconds", lambda *_: 200)
    run.videos("1x1")
    assert did == []
    assert run.book.data["postponed"] == ["video 1x1 1"]
    monkeypatch.setattr(node, "warm_up_seconds", lambda *_: 20)
    run.videos("1x1")
    assert did == ["warm 1x1", "video 1"]


def test_figures_of_another_run_are_neither_mixed_nor_lost(
    world_of_one: dist.ProcessGroup, tmp_path: Path
) -> None:
    path = tmp_path / "new" / "node.json"
    check_place(path, resume=False)
    Book(path, resume=False, budget=60, started=0).begin(model="A14B", gpus=8)
    with pytest.raises(SystemExit, match="--resume goes on with it"):
        check_place(path, resume=False)
    check_place(path, resume=True)
    again = Book(path, resume=True, budget=60, started=0)
    again.begin(model="A14B", gpus=8)
    with pytest.raises(ValueError, match="has figures of model A14B, this run is of 5B"):
        again.begin(model="5B", gpus=8)
    assert json.loads(path.read_text()) == {"steps": {}, "model": "A14B", "gpus": 8}
    assert [one.name for one in path.parent.iterdir()] == ["node.json"]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ({"quality": "8bit", "told": None}, "quality: got '8bit'"),
        ({"layouts": ["1x1", "1x2"]}, "layout 1x2 is not of 1 ranks"),
    ],
)
def test_what_can_not_be_run_is_refused_before_the_model_is_made(
    world_of_one: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch, words: dict[str, Any], error: str
) -> None:
    given = dict.fromkeys(("size", "layouts", "told", "frame_num"))
    given |= {"model": "A14B", "device": "cpu", "quality": "lossless", "sampling_steps": 2} | words
    monkeypatch.setattr(node, "join_ranks", lambda *_: CPU)
    monkeypatch.setattr(Node, "make", lambda self: pytest.fail("made"))
    with pytest.raises(ValueError, match=error):
        node.Run(argparse.Namespace(**given), Book(None, resume=False, budget=60, started=0))


def test_the_time_that_is_lent_began_with_the_process() -> None:
    spent = subprocess.run(
        [
            sys.executable,
            "-c",
            "import time; time.sleep(1); from benchmarks._ranks import _age; print(_age())",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert 1 < float(spent.stdout) < 120


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
    assert [len(prompt_of(characters)) for characters in (32, 128, 512)] == [32, 128, 512]
    assert node.default_layouts(8) == ["1x8", "2x4"]
    assert node.default_layouts(2) == ["2x1", "1x2"]
    assert node.default_layouts(3) == ["1x3"]
    assert node.default_layouts(1) == ["1x1"]


def test_what_a_part_will_take_is_near_what_it_took_on_a_gpu(alone: Node) -> None:
    """One H200: steps of 480p and 720p as docs/log.md has them, and the 97 s that 480p's part took."""
    config = FULL["A14B"].dit
    small = step_seconds(config, 21 * 30 * 52, gpus=1)
    assert small == pytest.approx(4.758, rel=0.2)
    assert step_seconds(config, 21 * 45 * 80, gpus=1) == pytest.approx(18.87, rel=0.2)
    took = sustained_seconds(4.758, 4.0, profiled=False) + 5 * 4.758  # a profile was of 5 steps then
    assert 2 * took == pytest.approx(97, rel=0.1)
    assert 8 * step_seconds(config, 75600, gpus=8) == pytest.approx(step_seconds(config, 75600, gpus=1))
    tokens = [5 * 3 * 3, 3 * 3]  # of the rehearsal's two sizes, at 3 latent frames
    steps = sum(2 * step_seconds(alone.shape.dit, one, gpus=1) for one in tokens)
    assert warm_up_seconds(alone.pipeline, alone.shape.dit, gpus=1) == pytest.approx(20 + steps, rel=1e-12)

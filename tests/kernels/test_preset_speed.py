"""The presets' speed, rehearsed on a CPU: right ones get figures, wrong ones none; the video's model."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import _eight_variants as eight
from benchmarks import _preset_tables as tables
from benchmarks import _variants as variants
from benchmarks import preset_speed
from benchmarks._preset_run import Run
from benchmarks._video_model import Assumptions, BlockTimes, Pattern, denoising, patterns
from engine.kept_attention import KeptAttention
from engine.presets import EightBit
from kernels import attention_8bit
from kernels.fp8_gemm import Rows
from tests.support import threads

ALL = EightBit(keep_blocks=())


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors: threads only wait for one another."""
    with threads.one_thread():
        yield


@pytest.fixture
def run() -> Iterator[Run]:
    with torch.no_grad():
        yield Run(variants.Share("small", "720p", 8), 0.0, "cpu")


def quality(tmp_path: Path) -> Path:
    """As `benchmarks.presets` writes it."""
    path = tmp_path / "presets.json"
    told: dict[str, Any] = {"8bit": {"keep_blocks": []}, "8bit-cache": {"first_steps": 4}, "4bit": {}}
    reused = {"steps reused": "25.0%", "guidance reused": "10.0%", "attention reused": "20.0%"}
    none = dict.fromkeys(reused, "0.0%")
    rows = {
        "lossless": none,
        "8bit": {**none, "may be offered": True},
        "8bit-cache": {**reused, "may be offered": False},
        "4bit": none,
    }
    path.write_text(json.dumps({"captions": 9, "told": told, "presets": rows}))
    return path


def test_the_rehearsal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, given = (
        tmp_path / "new" / "speed.json",
        ["--quality", str(quality(tmp_path)), "--decode-seconds", "4"],
    )
    preset_speed.main(["--device", "cpu", "--seconds", "0", "--json", str(out), *given])
    printed = capsys.readouterr().out
    report = json.loads(out.read_text())
    assert not report["problems"]
    assert set(report["results"]) == {
        tables.FLASH2, tables.LOSSLESS, tables.EIGHT, tables.KEPT, tables.FLOOR, "products, bf16",
        "products, e4m3", "attention, bf16, the engine's choice", tables.alone("emulation"),
    }  # fmt: skip
    errors = {name: result["error"] for name, result in report["results"].items()}
    assert errors[tables.KEPT] < 1e-6
    assert 1e-4 < errors[tables.LOSSLESS] < 1e-2 < errors[tables.EIGHT] < 0.1
    assert 1e-4 < errors[tables.FLASH2] < 1e-2
    assert report["stack"]["errors"][tables.LOSSLESS] < 1e-2 < report["stack"]["errors"][tables.EIGHT] < 0.1
    assert set(report["modelled"]) == {tables.FLASH2, "lossless", "8bit", "8bit-cache"}
    assert "| 8bit-cache |" in printed
    assert "Modelled, not measured:" in printed
    assert "quality floor MISSED" in printed
    preset_speed.main(["--figures", str(out), *given])
    assert capsys.readouterr().out == printed
    with pytest.raises(SystemExit, match="--attention cudnn: the figures have no row"):
        preset_speed.main(["--figures", str(out), "--attention", "cudnn", *given])
    report["results"][f"{tables.EIGHT}, attention by cudnn"] = report["results"][tables.EIGHT] | {"ms": 1.25}
    out.write_text(json.dumps(report))
    preset_speed.main(["--figures", str(out), "--attention", "cudnn", *given])
    assert "| 8bit | 1.25 |" in capsys.readouterr().out


def test_a_wrong_or_failing_contestant_has_no_figure(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong attention, one that raises, and a right one under another name, beside the engine's."""

    def wrong(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return 1.2 * attention_8bit.attention(q, k, v)

    def failing(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        raise ModuleNotFoundError("no such library")

    named = {
        "emulation": attention_8bit.attention,
        "wrong": wrong,
        "failing": failing,
        "other": attention_8bit.attention,
    }
    monkeypatch.setattr(eight, "backends", lambda device: named)
    written: list[dict[str, Any]] = []
    run.go(["8bit", "8 bits"], math.inf, lambda report: written.append(json.loads(json.dumps(report))))
    blocks = {name: f"{tables.EIGHT}, attention by {name}" for name in ("wrong", "failing", "other")}
    for name in ("wrong", "failing"):
        for gone in (tables.alone(name), blocks[name]):
            assert gone not in run.results
            assert gone in run.problems
    assert "relative error 0.2" in run.problems[tables.alone("wrong")]
    assert "relative error 0.2" in run.problems[blocks["wrong"]]
    assert "no such library" in run.problems[blocks["failing"]]
    assert {tables.EIGHT, tables.alone("emulation"), tables.FLOOR, blocks["other"]} <= set(run.results)
    assert run.results[tables.FLOOR]["attention"] in ("emulation", "other")
    assert not run.failed  # other attentions are optional
    assert [len(report["results"]) + len(report["problems"]) for report in written] == list(range(1, 11))
    text = tables.text(run.report(), patterns(None), Assumptions())
    assert f"| {blocks['other']} |" in text
    assert f"| {blocks['wrong']} |" not in text


def test_wrong_blocks_of_the_engines_are_failures(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here products of NaN."""

    def nothing(x: Rows, weight: Rows, bias: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((*x.data.shape[:-1], weight.data.shape[0]), torch.nan, dtype=dtype)

    monkeypatch.setattr("kernels.fp8_gemm.reference.linear", nothing)
    run.go(["8bit", "e4m3"], math.inf, lambda report: None)
    assert not run.results
    assert set(run.problems) == {tables.EIGHT, tables.KEPT, "products, e4m3"}
    assert all("relative error nan" in problem for problem in run.problems.values())
    assert run.failed
    assert not run.stack


def test_a_kept_attention_must_be_the_computed_one(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        KeptAttention,
        "take",
        lambda self, block, lane, batch: 1.5 * self._kept[block, lane] if self._reusing else None,
    )
    run.go([tables.EIGHT], math.inf, lambda report: None)
    assert set(run.results) == {tables.EIGHT}
    assert set(run.problems) == {tables.KEPT}


def test_none_begins_after_the_budget(run: Run) -> None:
    run.go([], -1.0, lambda report: None)
    assert not run.results
    assert all("not begun" in problem for problem in run.problems.values())
    assert run.failed


def test_a_hand_computed_video() -> None:
    """Blocks of 30 and 20 ms; 10 blocks, 10 steps, two passes, no communication."""
    given = Assumptions(blocks=10, steps=10, communication=0.0)
    times = BlockTimes(30.0, 20.0, kept=5.0)
    assert denoising(times, Pattern(), given) == pytest.approx(6.0)  # 200 x 30 ms
    assert denoising(times, Pattern(bits=ALL), given) == pytest.approx(4.0)
    # First and last of ten blocks lossless: 22 ms in the mean.
    assert denoising(times, Pattern(bits=EightBit()), given) == pytest.approx(4.4)
    # Two of ten steps are lossless: 2 x 20 x 30 + 8 x 20 x 20 ms.
    assert denoising(times, Pattern(bits=EightBit((), first_steps=2)), given) == pytest.approx(4.4)
    # Half the steps computed, a fifth of them with one pass: 5 x 1.8 x 10 blocks x 20 ms.
    assert denoising(times, Pattern(0.5, 0.2, bits=ALL), given) == pytest.approx(1.8)
    # And in half of those a block takes 5 ms instead of 20.
    assert denoising(times, Pattern(0.5, 0.2, 0.5, ALL), given) == pytest.approx(1.8 * 12.5 / 20)
    dear = Assumptions(blocks=10, steps=10, communication=0.05, decode_seconds=4.0, decode_efficiency=0.5)
    assert denoising(times, Pattern(), dear) == pytest.approx(6.3)
    assert dear.decoding == pytest.approx(1.0)
    with pytest.raises(ValueError, match="not measured"):
        denoising(BlockTimes(30.0, 20.0), Pattern(0.5, 0.2, 0.5, ALL), given)
    with pytest.raises(ValueError, match="efficiency"):
        Assumptions(decode_efficiency=0.0)


def test_patterns_come_from_the_quality_file(tmp_path: Path) -> None:
    assert patterns(None) == {"8bit": Pattern(bits=EightBit())}
    found = patterns(quality(tmp_path))
    assert found["8bit"] == Pattern(bits=ALL, keeps_floor=True)
    assert found["8bit-cache"] == Pattern(0.25, 0.1, 0.2, EightBit(first_steps=4), False)
    assert set(found) == {"8bit", "8bit-cache"}  # 4 bits are another run's
    (tmp_path / "broken.json").write_text('{"told": {}}')
    with pytest.raises(ValueError, match=r"not what benchmarks\.presets writes"):
        patterns(tmp_path / "broken.json")


def report(blocks: dict[str, float], device: str = "NVIDIA H100 80GB HBM3") -> dict[str, Any]:
    one = {"error": 0.004, "bound": 0.01, "clock_mhz": 1400.0, "power_w": 699.0}
    return {
        "device": device,
        "share": {"model": "A14B", "size": "720p", "share": 8},
        "stack": {"blocks": 40, "errors": {}},
        "results": {name: {"ms": ms, **one} for name, ms in blocks.items()},
        "problems": {},
    }


def test_the_table_has_ratios_videos_and_targets(tmp_path: Path) -> None:
    blocks = {tables.FLASH2: 60.0, tables.CUDNN: 44.0, tables.LOSSLESS: 32.0, tables.EIGHT: 22.0}
    skips = patterns(quality(tmp_path))
    given = Assumptions(communication=0.0, decode_seconds=5.6)
    text = tables.text(report({**blocks, tables.KEPT: 6.0}), skips, given)
    assert "| 8bit | 22.00 | 2.73 x | 1.45 x | 0.004 | 1760 | 71.4 | 1400 | 699 |" in text
    assert f"| {tables.FLASH2} | 60.00 | 1.00 x | 0.53 x | 0.004 | 4800 | 193.0 |" in text
    assert "`8bit` block at most 23 ms: 22.00 ms, met" in text
    assert "stretch: at most 20 ms: 22.00 ms, not met" in text
    # 30 steps x 1.9 passes: 4 of 40 x 32 ms, 26 of 2 x 32 + 38 x (0.8 x 22 + 0.2 x 6) ms.
    seconds = 1.9 * (4 * 40 * 32 + 26 * (2 * 32 + 38 * 18.8)) / 1e3
    assert f"x `8bit`, modelled: {70.4 / seconds:.2f} x, met" in text
    assert f"under 60 s, modelled, video: {seconds + 1:.2f} s, met" in text
    without = tables.text(
        report(blocks), skips, given
    )  # its attention is reused, but no such block was timed
    assert "8bit-cache: not modelled" in without
    assert "| 8bit-cache |" not in without
    wrong = tables.text(report({**blocks, tables.FLASH2: 70.0}), skips, given)
    assert "no ratio is printed" in wrong
    assert "| 8bit | 22.00 | - | 1.45 x |" in wrong

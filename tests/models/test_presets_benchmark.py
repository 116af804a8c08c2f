"""The presets' table: its measures by known cases, its verdicts, and the whole command on a tiny model."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from benchmarks import calibrate, presets
from benchmarks._similarity import feature_distance, psnr_db, ssim
from engine.tiny import make_tiny
from models.demo.train.classifier import CHECKPOINT, Classifier
from tests.support import threads


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny tensors: threads only wait for one another."""
    with threads.one_thread():
        yield


@pytest.fixture
def clip() -> torch.Tensor:
    """Smooth colours with some noise, [3, 5, 32, 40]."""
    generator = torch.Generator().manual_seed(2)
    wave = torch.sin(torch.linspace(0, 6, 40))[None, None, None] * torch.ones(3, 5, 32, 1)
    return (0.6 * wave + 0.1 * torch.randn(3, 5, 32, 40, generator=generator)).clamp(-1, 1)


def test_psnr(clip: torch.Tensor) -> None:
    assert psnr_db(clip, clip) == 100
    assert psnr_db(torch.zeros(3, 1, 8, 8), torch.full((3, 1, 8, 8), 0.2)) == pytest.approx(20, abs=1e-3)


def test_ssim_is_one_for_equal_clips_and_falls_with_noise(clip: torch.Tensor) -> None:
    def noisy(scale: float) -> torch.Tensor:
        return clip + scale * torch.randn(clip.shape, generator=torch.Generator().manual_seed(3))

    assert ssim(clip, clip) == pytest.approx(1, abs=1e-6)
    assert 1 > ssim(noisy(0.02), clip) > ssim(noisy(0.2), clip) > 0
    # Means that differ alone: (2 a b + c1) / (a^2 + b^2 + c1) with a 0.75, b 0.5 in [0, 1].
    flat = ssim(torch.full((3, 1, 16, 16), 0.5), torch.zeros(3, 1, 16, 16))
    assert flat == pytest.approx((2 * 0.75 * 0.5 + 1e-4) / (0.75**2 + 0.5**2 + 1e-4), abs=1e-4)


def test_the_distance_in_features(clip: torch.Tensor) -> None:
    torch.manual_seed(1)
    judge = Classifier().eval()
    assert feature_distance(judge, clip, clip) == 0
    near, far = feature_distance(judge, clip * 0.98, clip), feature_distance(judge, -clip, clip)
    assert 0 < near < far


def rows(decibels: float, right: int) -> list[presets.Row]:
    """100 clips: lossless reads 80 right, the preset `right`, at one PSNR."""

    def one(db: float, ok: bool, reused: int = 0) -> presets.Row:
        work = {"steps_computed": 20 - reused, "steps_reused": reused, "guidance_reused": 0}
        return {"psnr_db": db, "ssim": 1.0, "features": 0.0, "tally": {"all": [int(ok), 1]}, "work": work}

    return [
        {"presets": {
            "lossless": one(100, i < 80), presets.OTHER: one(50, i < 80), "8bit": one(decibels, i < right, 5),
        }}
        for i in range(100)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("decibels", "right", "kept"), [(30.0, 78, True), (29.9, 80, False), (40.0, 77, False), (30.1, 90, True)]
)
def test_floors_decide_what_may_be_offered(decibels: float, right: int, kept: bool) -> None:
    found = presets.summary(rows(decibels, right), ("8bit",))
    assert found["8bit"]["may be offered"] is kept
    assert found["8bit"]["read right"] == f"{right}/100 = {right / 100:.1%}"
    assert found["8bit"]["steps reused"] == "25.0%"
    assert "may be offered" not in found["lossless"]
    assert presets.table(found).splitlines()[-1].endswith("| yes |" if kept else "| no |")


def test_the_whole_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(presets.Maker, "made", None)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)  # other tests go on with theirs
    monkeypatch.setattr(presets, "WORST", 1)
    model = make_tiny(tmp_path / "model")
    told = {"8bit": {"keep_blocks": []}, "8bit-cache": {"keep_blocks": [0], "step_threshold": 9, "first": 1}}
    facts = json.loads((model / "reel.json").read_text())
    (model / "reel.json").write_text(json.dumps(facts | {"sizes": ["64*64"], "presets": told}))
    torch.manual_seed(1)
    save_file(Classifier().state_dict(), model / CHECKPOINT)
    out = tmp_path / "out" / "table.json"
    command = [
        "--model",
        str(model),
        "--judge",
        str(model),
        "--count",
        "1",
        "--frame-num",
        "5",
        "--side",
        "64",
    ]
    presets.main([*command, "--out", str(out)])
    found = json.loads(out.read_text())["presets"]
    assert list(found) == ["lossless", presets.OTHER, "8bit", "8bit-cache"]
    assert found["lossless"]["psnr_db"] == 100
    assert found[presets.OTHER]["psnr_db"] > found["8bit"]["psnr_db"]
    assert found["8bit-cache"]["steps reused"] != "0.0%"
    sheet = np.asarray(Image.open(out.with_name("table-worst-8bit.png")))
    assert sheet.shape == (2 * 64, 6 * 64, 3)
    monkeypatch.setattr(presets.Maker, "row", None)  # what is in the log is not made again
    presets.main([*command, "--out", str(out)])
    assert capsys.readouterr().out.count("| 8bit-cache |") == 2
    with pytest.raises(SystemExit):
        presets.main([*command, "--presets", "draft"])


class Ladder(calibrate.Trial):
    """Instead of clips: the decibels and the lost points that a setting gives."""

    def __init__(self, lossless_blocks_db: float, reuse_db: float, reuse_points: float = 0.0) -> None:
        self.block_db, self.reuse_db, self.reuse_points = lossless_blocks_db, reuse_db, reuse_points

    def losses(self, name: str, told: calibrate.Parts) -> tuple[float, float, float]:
        parts = told[name]
        kept = 24 + self.block_db * len(parts["keep_blocks"]) + parts["first_steps"]
        step = parts.get("step_threshold", 0.0)
        return kept - self.reuse_db * step, self.reuse_points * step, 0.5


def test_calibration_takes_the_boldest_that_keeps_the_floor() -> None:
    told = calibrate.calibrate(Ladder(3.0, 20.0))
    # 24 + 2 * 3 = 30 and 32 with two lossless steps; the floor is 30 and 1 to spare.
    assert told["8bit"] == {"keep_blocks": [0, -1], "first_steps": 2}
    # 32 - 20 * 0.25 = 27 keeps 26, 32 - 20 * 0.4 = 24 does not.
    assert told["8bit-cache"]["step_threshold"] == 0.25
    assert told["8bit-cache"]["keep_blocks"] == [0, -1]
    # 12 * 0.25 = 3 points are more than 2, 12 * 0.12 are not.
    assert calibrate.calibrate(Ladder(3.0, 20.0, 12.0))["8bit-cache"]["step_threshold"] == 0.12
    # 4 bits have their own floor, 25, and no caching on top.
    assert told["4bit"] == {"keep_blocks": [0, -1], "first_steps": 0}
    assert calibrate.calibrate(Ladder(0.0, 1.0), "8bit") == {}
    assert calibrate.calibrate(Ladder(0.0, 1.0)) == {"4bit": {"keep_blocks": [0, -1], "first_steps": 2}}
    assert set(calibrate.calibrate(Ladder(3.0, 1e6), "8bit")) == {"8bit", "8bit-cache"}  # attention is left
    assert set(calibrate.calibrate(Ladder(3.0, 1.0), "4bit")) == {"4bit"}


def test_calibration_compares_with_the_lossless_clips(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    model = make_tiny(tmp_path / "model")
    facts = json.loads((model / "reel.json").read_text())
    (model / "reel.json").write_text(json.dumps(facts | {"sizes": ["64*64"], "sampling_steps": 2}))
    setting = presets.Setting(model, None, (), "", 1, 64, 1, "cpu")
    trial = calibrate.Trial(presets.Maker(setting), 1)
    few, _, whole = trial.losses("8bit", {"8bit": {"keep_blocks": [0]}})
    assert trial.losses("8bit", {"8bit": {"keep_blocks": [0, 1]}}) == (100.0, 0.0, 1.0)
    assert 15 < few < 100
    assert whole == 1

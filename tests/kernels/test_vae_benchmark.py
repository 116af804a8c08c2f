"""The VAE benchmark rehearsed on a CPU: the official computation is right; a wrong video has no figure."""

import argparse
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import _official_vae as official
from benchmarks import vae as benchmark
from benchmarks._random_vae import random_vae
from engine.vae import VAE
from tests.kernels.check import relative_error

CPU = torch.device("cpu")
SIZES = argparse.Namespace(
    frames=2, rows=2, columns=3, seconds=0.0, only=[benchmark.OURS], convolutions=False, device="cpu"
)


@pytest.mark.parametrize(("frames", "rows", "columns"), [(1, 3, 2), (4, 1, 5)])
def test_the_official_computation_is_the_engines_formula(frames: int, rows: int, columns: int) -> None:
    vae = random_vae(CPU)
    latents = torch.randn(1, 16, frames, rows, columns, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        got, want = official.decode(vae, latents), vae.decode(latents)
    assert 0.2 < float(want.std()) < 2  # pixels, not noise around zero or far beyond the range
    assert relative_error(got, want.clamp(-1, 1)) < 1e-5


def test_a_rehearsal_gives_figures_and_every_convolution() -> None:
    arguments = argparse.Namespace(**(vars(SIZES) | {"only": [], "convolutions": True}))
    with torch.inference_mode():
        found = benchmark.run(arguments, CPU)
    assert list(found["results"]) == [benchmark.OFFICIAL, benchmark.OURS, "ours, cuDNN tries its algorithms"]
    assert all(row["seconds"] > 0 and row["repetitions"] >= 2 for row in found["results"].values())
    assert found["results"][benchmark.OURS]["psnr_db"] > 40
    assert not found["wrong"]
    # 33 causal 3 x 3 x 3 ones and three 2-D ones a latent frame, at the least
    assert sum(row["calls"] for row in found["convolutions"]) > 2 * 36
    assert "| ours | " in benchmark.table(found, "a CPU")


def test_a_wrong_video_has_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    decode = VAE.decode_chunks

    def off(self: VAE, latents: Tensor, *more: Any) -> Iterator[Tensor]:
        return (chunk + 0.2 for chunk in decode(self, latents, *more))

    monkeypatch.setattr(VAE, "decode_chunks", off)
    with torch.inference_mode():
        found = benchmark.run(SIZES, CPU)
    assert found["results"] == {}
    assert len(found["wrong"]) == 2
    assert "| ours | " not in benchmark.table(found, "a CPU")


def test_psnr_is_of_clamped_pixels_and_nan_counts() -> None:
    video = torch.zeros(1, 3, 2, 4, 4)
    assert benchmark.psnr(video, video) == math.inf
    assert benchmark.psnr(video + 0.02, video) == pytest.approx(40.0, abs=1e-4)  # 0.02 of a range of 2
    assert benchmark.psnr(video + 5, video + 1) == math.inf
    video[0, 0, 1, 2, 2] = math.nan
    assert math.isnan(benchmark.psnr(video, torch.zeros_like(video)))

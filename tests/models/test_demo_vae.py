"""The demo model's VAE in fp16, as GPUs run it: within the range, near fp32, and guarded beyond."""

import copy
import logging
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.vae import psnr
from engine import vae_chunks, vae_fused
from engine.load import load_pipeline
from engine.vae import VAE
from models.demo.train.common import MODEL_DIR


@pytest.fixture(scope="module")
def vae() -> VAE:
    return load_pipeline(MODEL_DIR, device="cpu").vae


@pytest.fixture(scope="module")
def latents(vae: VAE) -> Tensor:
    """Of five frames of soft colours, 32 x 24."""
    coarse = torch.rand(1, 3, 2, 3, 4, generator=torch.Generator().manual_seed(2)) * 2 - 1
    with torch.inference_mode():
        return vae.encode(F.interpolate(coarse, size=(5, 24, 32), mode="trilinear"))


@pytest.mark.parametrize("factor", [1.0, 2.0**12])
def test_fp16_stays_near_fp32(
    vae: VAE, latents: Tensor, caplog: pytest.LogCaptureFixture, factor: float
) -> None:
    """As it is, without any warning; and with a residual stream that leaves fp16's range."""
    with torch.inference_mode():
        want = vae.decode(latents)
        other = copy.deepcopy(vae)
        other.decoder = vae_chunks.scaled_down(other.decoder, factor)
        assert all(p.half().isfinite().all() for p in other.parameters())
        with (
            mock.patch.object(vae_fused, "applies", return_value=True),
            caplog.at_level(logging.WARNING),
        ):
            decibels = psnr(other.half().decode(latents.half()), want)
    print(f"{decibels:.1f} dB")
    assert decibels >= 60
    assert caplog.text.count("left fp16's range") == (0 if factor == 1 else 1)

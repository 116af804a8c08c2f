"""The fused VAE decoder on the Triton kernels themselves, interpreted: the plain decoder's video."""

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from engine import vae_fused
from engine.config import VAEConfig
from engine.tiny import randomize
from engine.vae import VAE
from tests.kernels.check import relative_error


def interpreted_join(x: Tensor, out: Tensor, **more: Any) -> Tensor:
    from kernels.vae_norm_silu import triton

    names = ("past_BCTHW", "bias_C", "shortcut_BCTHW", "gamma_C", "silu", "keep")
    defaults = {"silu": True, "keep": False}
    return triton.join(x, out, *(more.get(name, defaults.get(name)) for name in names))


def interpreted_interleave(phases: Tensor, bias: Tensor | None) -> Tensor:
    from kernels.vae_upsample import triton

    return triton.interleave(phases, bias)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("kind", ["2.1", "2.2"])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float16, 5e-3)])
def test_fused_on_the_kernels_is_plain(
    seed: int, device: torch.device, kind: str, dtype: torch.dtype, limit: float, flat: bool
) -> None:
    """Fresh memory is poisoned here, so nothing that a kernel leaves out can pass."""
    stride = (4, 16, 16) if kind == "2.2" else (4, 8, 8)
    vae = VAE(VAEConfig("2.2" if kind == "2.2" else "2.1", 8, 8, 4, (0.1,) * 4, (1.2,) * 4, stride=stride))
    randomize(vae, torch.Generator().manual_seed(seed))
    vae = vae.requires_grad_(False).eval().to(device)
    latents = torch.randn(1, 4, 3, 1, 3, device=device)
    want = vae.decode(latents)
    with (
        mock.patch.object(vae_fused, "applies", return_value=True),
        mock.patch.object(vae_fused.vae_norm_silu, "join", interpreted_join),
        mock.patch.object(vae_fused.vae_norm_silu, "flat", return_value=flat),
        mock.patch.object(vae_fused.vae_upsample, "interleave", interpreted_interleave),
        torch.inference_mode(),
    ):
        got = vae.to(dtype).decode(latents.to(dtype))
    error = relative_error(got, want)
    print(f"relative error {error:.2e}")
    assert error < limit

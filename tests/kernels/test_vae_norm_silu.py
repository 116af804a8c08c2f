"""The VAE's channel norm + SiLU against fp64, under the interpreter or on the GPU."""

import pytest
import torch

from kernels.vae_norm_silu import reference
from tests.kernels.check import assert_as_good

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("shape", [(1, 96, 1, 3, 5), (2, 20, 3, 2, 7), (1, 3, 2, 1, 1)])
def test_norm_silu(
    seed: int, device: torch.device, dtype: torch.dtype, silu: bool, shape: tuple[int, int, int, int, int]
):
    from kernels.vae_norm_silu import triton

    x = (torch.randn(shape, device=device) * 3).to(dtype)
    gamma = torch.randn(shape[1], device=device)
    exact = reference.norm_silu(x.double(), gamma.double(), silu)
    assert_as_good(triton.norm_silu(x, gamma, silu), reference.norm_silu(x, gamma, silu), exact)


def test_writes_inside_a_padded_buffer_and_nowhere_else(seed: int, device: torch.device):
    from kernels.vae_norm_silu import triton

    x = torch.randn(1, 6, 2, 3, 4, device=device).contiguous(memory_format=torch.channels_last_3d)
    gamma = torch.randn(6, device=device)
    buffer = torch.zeros(1, 4, 5, 6, 6, device=device).permute(0, 4, 1, 2, 3)  # channels last
    inside = buffer[:, :, 2:, 1:4, 1:5]
    triton.norm_silu(x, gamma, out=inside)
    assert_as_good(inside, reference.norm_silu(x, gamma), reference.norm_silu(x.double(), gamma.double()))
    inside.zero_()
    assert not buffer.any()


def test_fp16_range_is_safe(seed: int, device: torch.device):
    """Activations near fp16's largest value: the sum of squares must not overflow."""
    from kernels.vae_norm_silu import triton

    x = (torch.randn(1, 64, 1, 2, 2, device=device) * 15_000).clamp(-65_000, 65_000).half()
    gamma = torch.ones(64, device=device)
    got = triton.norm_silu(x, gamma)
    assert got.isfinite().all()
    assert_as_good(got, reference.norm_silu(x, gamma), reference.norm_silu(x.double(), gamma.double()))


def test_zero_pixels_stay_zero(device: torch.device):
    from kernels.vae_norm_silu import triton

    got = triton.norm_silu(torch.zeros(1, 8, 1, 2, 2, device=device), torch.ones(8, device=device))
    assert not got.any()


def test_a_planar_output_is_refused(device: torch.device):
    from kernels.vae_norm_silu import triton

    x = torch.zeros(1, 8, 1, 2, 2, device=device)
    with pytest.raises(ValueError, match="channels last"):
        triton.norm_silu(x, torch.ones(8, device=device), out=torch.zeros(1, 8, 1, 2, 2, device=device))

"""Doubling and convolution as four phase convolutions: the same formula, fewer products."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.vae_upsample import fold, reference
from tests.kernels.check import assert_as_good, relative_error

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = pytest.mark.parametrize("shape", [(1, 6, 5, 3, 4), (2, 3, 96, 1, 1), (3, 5, 20, 2, 7)])


def operands(shape: tuple[int, int, int, int, int], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    n, c, o, h, w = shape
    weight = torch.randn(o, c, 3, 3, device=device) / (9 * c) ** 0.5
    return torch.randn(n, c, h, w, device=device), weight, torch.randn(o, device=device)


@SHAPES
def test_phases_are_the_doubled_maps_convolution(
    seed: int, device: torch.device, shape: tuple[int, int, int, int, int]
):
    """In fp64 nothing but the order of sums differs; also where the map ends."""
    x, weight, bias = (t.double() for t in operands(shape, device))
    want = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest-exact"), weight, bias, padding=1)
    got = reference.interleave(F.conv2d(x, fold(weight), padding=1), bias)
    assert relative_error(got, want) < 1e-14
    assert relative_error(reference.upsample_conv(x, weight, bias), want) < 1e-14


@SHAPES
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True])
def test_interleave(
    seed: int, device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int, int, int], biased: bool
):
    from kernels.vae_upsample import triton

    n, _, o, h, w = shape
    phases = torch.randn(n, 4 * o, h + 1, w + 1, device=device).to(dtype)
    bias = torch.randn(o, device=device).to(dtype) if biased else None
    exact = reference.interleave(phases.double(), None if bias is None else bias.double())
    for x in (phases, phases.contiguous(memory_format=torch.channels_last)):
        got = triton.interleave(x, bias)
        assert got.dtype == dtype
        assert got.is_contiguous(memory_format=torch.channels_last)
        assert_as_good(got, reference.interleave(phases, bias), exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_folded_weights_are_rounded_once(seed: int, device: torch.device, dtype: torch.dtype):
    weight = torch.randn(4, 8, 3, 3, device=device).to(dtype)
    assert fold(weight).dtype == dtype
    assert torch.equal(fold(weight), fold(weight.double()).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("c", "o"), [(192, 96), (64, 16)])
def test_rounding_weights_once_more_costs_little(
    seed: int, device: torch.device, dtype: torch.dtype, c: int, o: int
):
    x, weight, bias = (t.to(dtype) for t in operands((1, c, o, 9, 11), device))
    exact = reference.upsample_conv(x.double(), weight.double(), bias.double())
    plain = reference.upsample_conv(x, weight, None) + bias[:, None, None]
    got = reference.interleave(F.conv2d(x, fold(weight), padding=1), bias)
    ours, theirs = relative_error(got, exact), relative_error(plain, exact)
    print(f"relative error {ours:.3g}, unfolded {theirs:.3g}: {ours / theirs:.2f} times")
    assert ours < 1.25 * theirs


def test_what_is_no_four_phases_is_refused(device: torch.device):
    from kernels.vae_upsample import triton

    for shape in ((1, 6, 3, 3), (1, 8, 1, 3)):
        with pytest.raises(ValueError, match="no four phases"):
            triton.interleave(torch.zeros(shape, device=device), None)

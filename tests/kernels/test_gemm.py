"""Matrix products with epilogues against fp64, under the interpreter or on the GPU."""

import pytest
import torch

from kernels import gemm
from kernels.gemm import reference
from tests.kernels.check import assert_as_good

SIZE = {torch.float32: 4, torch.bfloat16: 2, torch.float16: 2}
SHAPES = [(1, 17, 40, 48), (2, 33, 72, 16), (1, 1, 136, 80)]  # batch, tokens, N, K: none fills its tile


def operands(shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device):
    batch, length, n, k = shape
    x = torch.randn(batch, length, k, device=device).to(dtype)
    weight = (torch.randn(n, k, device=device) / k**0.5).to(dtype)
    return x, weight, torch.randn(n, device=device).to(dtype)


def small_tile(halves: bool):
    from kernels.gemm import triton

    return triton.Tile(m=16, n=32, k=16, group=2, halves=halves, warps=4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("halves", [False, True])
def test_bias(seed: int, device: torch.device, shape: tuple[int, int, int, int], halves: bool):
    from kernels.gemm import triton

    x, weight, bias = operands(shape, torch.bfloat16, device)
    got = triton.product(x, weight, bias, triton.BIAS, small_tile(halves))
    exact = reference.linear(x.double(), weight.double(), bias.double())
    assert_as_good(got, reference.linear(x, weight, bias), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gelu(seed: int, device: torch.device, dtype: torch.dtype):
    from kernels.gemm import triton

    x, weight, bias = operands(SHAPES[0], dtype, device)
    bias *= 4  # both tails of the GELU
    got = triton.product(x, weight, bias, triton.GELU, small_tile(True))
    exact = reference.linear_gelu(x.double(), weight.double(), bias.double())
    assert_as_good(got, reference.linear_gelu(x, weight, bias), exact)


@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sets", [0, 1, 2])
def test_gated(seed: int, device: torch.device, stream: torch.dtype, sets: int):
    """residual + product * gate, without a gate and with one or two sets of gates."""
    from kernels.gemm import triton

    x, weight, bias = operands(SHAPES[1], torch.bfloat16, device)
    residual = torch.randn(2, 33, 72, device=device).to(stream)
    gate = torch.randn(1, sets, 72, device=device) if sets else None
    tile = small_tile(True)
    got = triton.product(x, weight, bias, triton.GATED, tile, residual, gate, split=11)
    plain = reference.linear_gated(x, weight, bias, residual, gate, 11)
    exact = reference.linear_gated(
        x.double(),
        weight.double(),
        bias.double(),
        residual.double(),
        None if gate is None else gate.double(),
        11,
    )
    assert got.dtype == stream
    assert_as_good(got, plain, exact)


def test_no_bias(seed: int, device: torch.device):
    from kernels.gemm import triton

    x, weight, _ = operands(SHAPES[2], torch.float16, device)
    got = triton.product(x, weight, None, triton.BIAS, small_tile(False))
    assert_as_good(
        got, reference.linear(x, weight, None), reference.linear(x.double(), weight.double(), None)
    )


def test_operands_that_tma_cannot_take_are_known(device: torch.device):
    from kernels.gemm import triton

    x = torch.zeros(1, 4, 20, dtype=torch.bfloat16, device=device)
    assert not triton.fits(x, torch.zeros(16, 20, dtype=torch.bfloat16, device=device))
    x = torch.zeros(1, 4, 24, dtype=torch.bfloat16, device=device)
    assert triton.fits(x, torch.zeros(16, 24, dtype=torch.bfloat16, device=device))
    assert not triton.fits(x, torch.zeros(12, 24, dtype=torch.bfloat16, device=device))
    shifted = torch.zeros(1 + 4 * 24, dtype=torch.bfloat16, device=device)[1:]  # begins between 16 bytes
    assert not triton.fits(shifted.view(1, 4, 24), torch.zeros(16, 24, dtype=torch.bfloat16, device=device))


def test_a_shared_residual_goes_to_the_library(device: torch.device):
    from kernels.gemm import triton

    x, weight, _ = operands(SHAPES[1], torch.bfloat16, device)
    assert triton.fits(x, weight, torch.zeros(2, 33, 72, device=device), torch.zeros(1, 2, 72, device=device))
    assert not triton.fits(x, weight, torch.zeros(1, 33, 72, device=device))
    assert not triton.fits(x, weight, None, torch.zeros(2, 1, 72, device=device))


def test_mismatched_operands_are_refused(device: torch.device):
    from kernels.gemm import triton

    x, weight, bias = operands(SHAPES[0], torch.bfloat16, device)
    with pytest.raises(ValueError, match="doesn't fit weight"):
        triton.product(x, weight.half(), bias, triton.BIAS, small_tile(False))


def test_dispatch_matches_the_reference(seed: int):
    """On a CPU the dispatch is the reference, bit for bit."""
    x, weight, bias = operands(SHAPES[0], torch.float32, torch.device("cpu"))
    residual = torch.randn(1, 17, 40)
    assert torch.equal(gemm.linear(x, weight, bias), reference.linear(x, weight, bias))
    assert torch.equal(gemm.linear_gelu(x, weight, bias), reference.linear_gelu(x, weight, bias))
    got = gemm.linear_gated(x, weight, bias, residual, None)
    assert torch.equal(got, reference.linear_gated(x, weight, bias, residual, None, 0))


def test_keys_share_a_bucket_of_rows():
    assert gemm.table_key("bias", 9450, 5120, 5120) == "bias 16384x5120x5120"
    assert gemm.table_key("bias", 4096, 5120, 5120) == gemm.table_key("bias", 4095, 5120, 5120)
    assert gemm.table_key("bias", 1, 8, 8) == "bias 2x8x8"

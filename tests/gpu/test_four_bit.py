"""NVFP4 on a GPU: the emulation's bits are a CPU's. Where the GPU is a Blackwell, its own path near them.

The last test had no GPU to run on so far: on any other it is skipped, and says so.
"""

import math

import pytest
import torch
from torch import Tensor

from kernels import nvfp4_gemm
from kernels.nvfp4_gemm import Blocks, blackwell, reference
from tests.kernels.check import relative_error

CUDA = torch.device("cuda")


def rows(count: int, width: int) -> Tensor:
    """Rows and blocks of unlike sizes, from huge to below the smallest scale, some of them not finite."""
    x = torch.randn(count, width) * torch.randn(count, width // 16).exp().repeat_interleave(16, dim=1)
    x *= 10.0 ** torch.randint(-44, 38, (count, 1))
    x[0], x[1, 5], x[2, 20], x[3, 0] = 0, math.nan, math.inf, -math.inf
    x[4] = torch.arange(width) % 27 * 0.25  # ties
    return x


def same(got: Blocks, want: Blocks) -> None:
    """Equal to the bit."""
    assert torch.equal(got.data.cpu(), want.data)
    assert torch.equal(got.scale.cpu().view(torch.uint8), want.scale.view(torch.uint8))
    assert torch.equal(got.outer.cpu().view(torch.int32), want.outer.view(torch.int32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantising_gives_a_cpus_bits(dtype: torch.dtype):
    x = rows(3001, 512).to(dtype)
    same(nvfp4_gemm.quantize_rows(x.to(CUDA)), nvfp4_gemm.quantize_rows(x))
    weight = (torch.randn(640, 512) / 20).to(dtype)
    same(nvfp4_gemm.quantize_weight(weight.to(CUDA)), nvfp4_gemm.quantize_weight(weight))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tf32", [False, True])
def test_emulated_products_give_a_cpus_bits(bias: bool, tf32: bool, monkeypatch: pytest.MonkeyPatch):
    """Few features of like sizes, so that fp32 sums are exact in any order; TF32 holds the factors."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", tf32)
    x = nvfp4_gemm.quantize_rows(torch.rand(777, 64) + 1)
    weight = nvfp4_gemm.quantize_weight((torch.rand(96, 64) + 1) * torch.randn(96, 64).sign())
    added = torch.randn(96) if bias else None
    inner = x.inner() @ weight.inner().t()
    assert torch.equal(inner.double(), x.inner().double() @ weight.inner().double().t())
    there = [Blocks(each.data.to(CUDA), each.scale.to(CUDA), each.outer.to(CUDA)) for each in (x, weight)]
    there_bias = None if added is None else added.to(CUDA)
    for out in (torch.float32, torch.bfloat16):
        got = reference.linear(there[0], there[1], there_bias, out)
        assert torch.equal(got.cpu(), reference.linear(x, weight, added, out))


@pytest.mark.parametrize(("count", "n", "k"), [(9450, 15360, 5120), (77, 5120, 13824)])
def test_emulated_products_at_wans_widths(count: int, n: int, k: int):
    x = nvfp4_gemm.quantize_rows(torch.randn(1, count, k, device=CUDA).bfloat16())
    weight = nvfp4_gemm.quantize_weight(torch.randn(n, k, device=CUDA).bfloat16() / math.sqrt(k))
    got = reference.linear(x, weight, None, torch.float32)
    exact = x.inner()[:, :64].double() @ weight.inner().double().t()
    exact = exact * x.outer[:, :64, None].double() * weight.outer.double()
    assert relative_error(got[:, :64], exact) < 1e-5


@pytest.mark.skipif(
    not torch.cuda.is_available() or not nvfp4_gemm.native(CUDA),
    reason="needs a Blackwell: NVFP4's native path was never run",
)
@pytest.mark.parametrize(("count", "n", "k"), [(9450, 15360, 5120), (4095, 5120, 13824), (77, 3072, 3072)])
def test_blackwells_products_are_the_emulations(count: int, n: int, k: int):
    x = nvfp4_gemm.quantize_rows(torch.randn(1, count, k, device=CUDA).bfloat16())
    weight = nvfp4_gemm.quantize_weight(torch.randn(n, k, device=CUDA).bfloat16() / math.sqrt(k))
    bias = torch.randn(n, device=CUDA).bfloat16()
    got = blackwell.linear(x, weight, bias, torch.bfloat16)
    # The inner product is rounded to bf16 before it is scaled.
    assert relative_error(got, reference.linear(x, weight, bias, torch.float32)) < 1e-2

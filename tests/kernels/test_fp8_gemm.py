"""Products in 8 bits: quantised passes against the reference, and the reference against fp64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import fp8_gemm
from kernels.fp8_gemm import Rows, reference
from kernels.fp8_gemm.rows import decode
from kernels.norm_modulate import Norm
from kernels.norm_modulate.reference import add_gated
from kernels.norm_modulate.reference import normalize as plain_normalize
from tests.kernels.check import relative_error

# Half a unit in the last place of e4m3's 3 bits is 1/16 of a value; random values are off by a third of it.
ROUNDING = 0.03


def same(got: Rows, want: Rows) -> None:
    """Equal scales and values, but for single values at the edge between two neighbours."""
    assert got.data.shape == want.data.shape
    assert got.data.dtype == want.data.dtype == torch.float8_e4m3fn
    assert relative_error(got.scale, want.scale) < 1e-6
    apart = got.data.float() != want.data.float()
    assert apart.float().mean() < 0.01
    assert relative_error(got.float(), want.float()) < 0.01


def modulation(batch: int, sets: int, dim: int, device: torch.device, split: int = 0) -> Norm:
    shift, scale = torch.randn(2, batch, sets, dim, device=device)
    return Norm(shift, scale, 1e-6, split)


@pytest.mark.parametrize("shape", [(1, 5, 64), (2, 3, 96), (7, 257), (1, 1, 1000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantize_rows(seed: int, device: torch.device, shape: tuple[int, ...], dtype: torch.dtype):
    from kernels.fp8_gemm import triton

    x = (torch.randn(shape, device=device) * torch.rand(shape[:-1], device=device)[..., None] * 9).to(dtype)
    got = triton.quantize_rows(x)
    same(got, reference.quantize_rows(x))
    assert relative_error(got.float(), x) < ROUNDING
    assert got.data.float().abs().amax(-1).eq(448).all()  # each row uses the whole range


def test_zeros_and_nan(seed: int, device: torch.device):
    from kernels.fp8_gemm import triton

    x = torch.randn(4, 48, device=device)
    x[1], x[2, 5] = 0, float("nan")
    for found in (triton.quantize_rows(x), reference.quantize_rows(x)):
        assert found.float()[1].eq(0).all()
        assert found.scale[1] == 1
        assert found.float()[2, 5].isnan()
        assert not found.float()[[0, 3]].isnan().any()


@pytest.mark.parametrize(("length", "width"), [(5, 64), (3, 200)])
def test_gelu_quantize(seed: int, device: torch.device, length: int, width: int):
    from kernels.fp8_gemm import triton

    x = (torch.randn(2, length, width, device=device) * 3).bfloat16()
    got = triton.gelu_quantize(x)
    same(got, reference.gelu_quantize(x))
    assert relative_error(got.float(), F.gelu(x.double(), approximate="tanh")) < ROUNDING


@pytest.mark.parametrize(("batches", "sets", "split"), [(1, 1, 0), (2, 1, 0), (1, 2, 2), (2, 2, 5)])
def test_normalize(seed: int, device: torch.device, batches: int, sets: int, split: int):
    from kernels.fp8_gemm import triton

    x, norm = torch.randn(2, 5, 72, device=device) * 3 + 5, modulation(batches, sets, 72, device, split)
    got = triton.normalize(x, norm)
    same(got, reference.normalize(x, norm))
    assert relative_error(got.float(), plain_normalize(x, norm, torch.float32)) < ROUNDING


@pytest.mark.parametrize("branch", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_add_normalize(seed: int, device: torch.device, branch: torch.dtype, gated: bool, shared: bool):
    from kernels.fp8_gemm import triton

    x = torch.randn(1 if shared else 2, 3, 130, device=device) * 3 + 5
    y = torch.randn(2, 3, 130, device=device).to(branch)
    gate = torch.randn(1, 2, 130, device=device) if gated else None
    norm = modulation(1, 2, 130, device, split=1)
    new, got = triton.add_normalize(x, y, gate, norm)
    want_new, want = reference.add_normalize(x, y, gate, norm)
    assert relative_error(new, want_new) < 1e-6
    assert relative_error(new, add_gated(x.double(), y.double(), gate, 1)) < 1e-6
    same(got, want)


def test_wrong_shapes_are_refused(device: torch.device):
    from kernels.fp8_gemm import triton

    x, norm = torch.zeros(1, 3, 32, device=device), modulation(1, 1, 32, device)
    with pytest.raises(ValueError, match="doesn't broadcast"):
        triton.add_normalize(x, torch.zeros(1, 4, 32, device=device), None, norm)
    with pytest.raises(ValueError, match="expected"):
        triton.normalize(x, modulation(1, 1, 16, device))


def outliers(rows: int, width: int) -> Tensor:
    """Activations as a deep model has them: a few huge features, rows of unlike size."""
    x = torch.randn(rows, width) * torch.rand(rows, 1) * 4
    x[:, 0] *= 30
    return x


def test_a_product_is_that_of_the_quantised_values(seed: int):
    x, weight, bias = outliers(9, 160), torch.randn(48, 160), torch.randn(48)
    x8, w8 = reference.quantize_rows(x), reference.quantize_rows(weight)
    exact = x8.float().double() @ w8.float().double().t() + bias.double()
    got = fp8_gemm.linear(x8, w8, bias, torch.float32)
    assert relative_error(got, exact) < 1e-6
    assert got.shape == (9, 48)
    assert relative_error(got, x.double() @ weight.double().t() + bias) < 0.06
    assert fp8_gemm.linear(x8, w8, None, torch.bfloat16).dtype == torch.bfloat16


def test_output_channels_can_be_taken_apart(seed: int):
    x8, w8 = reference.quantize_rows(outliers(5, 64)), reference.quantize_rows(torch.randn(30, 64))
    whole = fp8_gemm.linear(x8, w8, None, torch.float32)
    parts = [fp8_gemm.linear(x8, w8.rows(slice(n, n + 10)), None, torch.float32) for n in (0, 10, 20)]
    assert relative_error(torch.cat(parts, -1), whole) < 1e-6


def test_every_code_is_decoded():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    got, want = decode(codes), codes.float()
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(1000), want.nan_to_num(1000))

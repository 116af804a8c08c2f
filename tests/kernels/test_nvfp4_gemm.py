"""Products in NVFP4: rounding against an exhaustive search, products against fp64, what isn't finite."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import fp8_gemm, norm_modulate, nvfp4_gemm
from kernels.norm_modulate import Norm
from kernels.nvfp4_gemm import Blocks, reference
from kernels.nvfp4_gemm.blocks import pack, unpack
from kernels.nvfp4_gemm.reference import round_e2m1
from tests.kernels.check import relative_error

# Of normal values: a block's values lie up to 1/6 apart at its largest, by the format alone.
ROUNDING = 0.12


def e2m1(code: int) -> float:
    """By the format's definition: a sign, two bits of exponent with bias 1, one of mantissa."""
    exponent, mantissa = code >> 1 & 3, code & 1
    value = mantissa * 0.5 if exponent == 0 else (1 + mantissa * 0.5) * 2.0 ** (exponent - 1)
    return -value if code & 8 else value


def e4m3(code: int) -> float:
    """Positive, four bits of exponent with bias 7, three of mantissa; code 127 is NaN."""
    exponent, mantissa = code >> 3, code & 7
    return mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)


def nearest(x: float, values: dict[int, float]) -> int:
    """The code of the nearest value by search, a tie going to the even code."""
    return min(values, key=lambda code: (abs(values[code] - x), code & 1))


def slowly(row: list[float], outer: float) -> list[float]:
    """A row's quantised values over its outer scale, block by block and value by value."""
    f32 = torch.tensor
    found: list[float] = []
    scales = {code: e4m3(code) for code in range(127)}
    for start in range(0, len(row), 16):
        block = row[start : start + 16]
        wanted = float(f32(max(map(abs, block))) / (f32(outer) * 6))
        scale = scales[nearest(wanted, scales)]
        step = f32(scale) * f32(outer)
        for x in block:
            codes = {code: e2m1(code) for code in range(8)}
            code = 0 if step == 0 else nearest(abs(float(f32(x) / step)), codes)
            found.append(math.copysign(e2m1(code) * scale, x))
    return found


def test_every_code_is_its_own_nearest(device: torch.device):
    codes = torch.arange(16, dtype=torch.uint8, device=device)
    values = torch.tensor([e2m1(code) for code in range(16)], device=device)
    assert torch.equal(round_e2m1(values), codes.where(codes != 8, 0))  # minus zero is zero
    assert torch.equal(unpack(pack(codes)), values)
    assert pack(torch.tensor([1, 2], dtype=torch.uint8)).item() == 0x21  # the even one is the low half


@pytest.mark.parametrize(
    ("x", "want"),
    [
        (0.25, 0), (0.75, 1), (1.25, 1), (1.75, 2), (2.5, 2), (3.5, 4), (5, 4),  # ties, to the even code
        (0.2500001, 0.5), (0.7499999, 0.5), (4.9999995, 4), (5.0000005, 6), (6, 6), (6.5, 6), (1e30, 6),
        (math.inf, 6), (math.nan, 0), (1e-40, 0),
    ],
)  # fmt: skip
def test_rounding(device: torch.device, x: float, want: float):
    found = unpack(pack(round_e2m1(torch.tensor([x, -x], device=device))))
    assert found.tolist() == [want, -want]
    assert not found[1].signbit() or want > 0


@pytest.mark.parametrize("shape", [(1, 16), (3, 64), (2, 2, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_against_a_search_for_the_nearest(
    seed: int, device: torch.device, shape: tuple[int, ...], dtype: torch.dtype
):
    wide = torch.randn(shape).exp() * torch.randn(shape)  # blocks of unlike sizes
    x = (wide * 10.0 ** torch.randint(-3, 4, shape[:-1])[..., None]).to(dtype)
    x[..., 3] = 0
    found = nvfp4_gemm.quantize_rows(x.to(device))
    assert (found.data.shape, found.data.dtype) == ((*shape[:-1], shape[-1] // 2), torch.uint8)
    assert (found.scale.shape, found.scale.dtype) == ((*shape[:-1], shape[-1] // 16), torch.float8_e4m3fn)
    assert found.width == shape[-1]
    outer = x.float().abs().amax(-1) / torch.tensor(6 * 448.0)
    assert torch.equal(found.outer.cpu(), outer)
    assert found.scale.float().amax(-1).eq(448).all()  # the largest block uses e4m3's whole range
    want = [
        slowly(row, float(o))
        for row, o in zip(x.float().view(-1, shape[-1]).tolist(), outer.view(-1), strict=True)
    ]
    assert torch.equal(found.inner().cpu().view(-1, shape[-1]), torch.tensor(want))


def test_a_token_depends_on_no_other(seed: int, device: torch.device):
    x = torch.randn(2, 6, 32, device=device) * torch.arange(1, 7, device=device)[:, None]
    whole, part = nvfp4_gemm.quantize_rows(x), nvfp4_gemm.quantize_rows(x[1:, 2:4])
    assert torch.equal(part.float(), whole.float()[1:, 2:4])


def test_a_weight_has_one_outer_scale(seed: int, device: torch.device):
    weight = torch.randn(5, 48, device=device).bfloat16()
    weight[2] *= 100
    found = nvfp4_gemm.quantize_weight(weight)
    outer = (weight.float().abs().amax() / torch.tensor(6 * 448.0, device=device)).expand(5)
    assert torch.equal(found.outer, outer)
    want = [slowly(row, float(outer[0])) for row in weight.float().tolist()]
    assert torch.equal(found.inner().cpu(), torch.tensor(want))
    both = nvfp4_gemm.join((found, nvfp4_gemm.quantize_weight(weight[:2])))
    assert both.float().shape == (7, 48)
    assert torch.equal(both.rows(slice(0, 5)).float(), found.float())
    assert both.outer[5] < both.outer[4]


def test_blocks_far_below_the_largest(device: torch.device):
    x = torch.zeros(2, 48, device=device)
    x[:, 0] = 6 * 448  # so the outer scale is 1
    x[0, 16], x[0, 17] = 6 * 2.0**-9, 2.0**-9  # the smallest scale there is
    x[1, 16], x[1, 17] = 6 * 2.0**-10, -(2.0**-10)  # half of it: a tie, to zero
    found = nvfp4_gemm.quantize_rows(x)
    assert found.outer.tolist() == [1, 1]
    assert torch.equal(found.float()[0], x[0])
    assert found.float()[1, 16:].eq(0).all()


@pytest.mark.parametrize("largest", [1e-45, 1e-38, 1e-30, 3e38])
def test_the_ends_of_fp32(device: torch.device, largest: float):
    x = torch.linspace(-1, 1, 32, device=device)[None] * largest
    found = nvfp4_gemm.quantize_rows(x)
    assert found.float().isfinite().all()
    assert (found.float() - x).abs().max() <= largest / 6 * 1.07 + 2.0**-135


def test_zeros_and_what_is_not_finite(seed: int, device: torch.device):
    x = torch.randn(5, 32, device=device)
    x[1], x[2, 5], x[3, 20], x[4, 20] = 0, math.nan, math.inf, -math.inf
    found = nvfp4_gemm.quantize_rows(x)
    assert found.float()[1].eq(0).all()
    assert found.outer[1] == 1
    assert not found.float()[0].isnan().any()
    assert found.float()[2:].isnan().all()  # the whole token, in every block
    assert (found.scale[2:].view(torch.uint8) == 0x7F).all()  # the positive NaN, on every device
    weight = nvfp4_gemm.quantize_weight(torch.randn(8, 32, device=device))
    product = nvfp4_gemm.linear(found, weight, None, torch.bfloat16)
    assert product[2:].isnan().all()
    assert product[:2].isfinite().all()
    assert nvfp4_gemm.quantize_weight(x).float().isnan().all()


@pytest.mark.parametrize("width", [1, 15, 24, 40])
def test_widths_that_blocks_do_not_fill_are_refused(width: int):
    for quantize in (nvfp4_gemm.quantize_rows, nvfp4_gemm.quantize_weight):
        with pytest.raises(ValueError, match=f"blocks of 16 features: {width} is no multiple"):
            quantize(torch.ones(2, width))


@pytest.mark.parametrize("shape", [(1, 7, 64), (2, 3, 128), (5, 256)])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_is_the_product_of_what_was_quantised(
    seed: int, device: torch.device, shape: tuple[int, ...], bias: bool
):
    x, weight = torch.randn(shape, device=device), torch.randn(24, shape[-1], device=device) / 8
    added = torch.randn(24, device=device) if bias else None
    x4, w4 = nvfp4_gemm.quantize_rows(x), nvfp4_gemm.quantize_weight(weight)
    got = nvfp4_gemm.linear(x4, w4, added, torch.float32)
    inner = x4.inner().double() @ w4.inner().double().t()
    exact = inner * x4.outer.double()[..., None] * w4.outer.double()
    exact = exact if added is None else exact + added.double()
    assert got.shape == (*shape[:-1], 24)
    assert relative_error(got, exact) < 1e-6
    assert relative_error(got, exact) <= relative_error(F.linear(x4.float(), w4.float(), added), exact) + 1e-7
    assert torch.equal(nvfp4_gemm.linear(x4, w4, added, torch.bfloat16), got.bfloat16())
    plain = F.linear(x.double(), weight.double(), None if added is None else added.double())
    assert 0.01 < relative_error(got, plain) < 2 * ROUNDING


def test_products_are_exact_in_fp32(device: torch.device):
    """Every product of two quantised values, over their outer scales, in 12 bits."""
    values = torch.tensor([e2m1(code) for code in range(1, 8)], device=device)
    scales = torch.tensor([e4m3(code) for code in range(1, 127)], device=device)
    inner = torch.outer(values, scales).flatten().unique()
    mantissa, _ = torch.frexp(inner)
    assert (mantissa * 2**6).frac().eq(0).all()
    product = torch.outer(inner, inner)
    assert torch.equal(product.double(), torch.outer(inner.double(), inner.double()))


def test_passes_end_in_the_quantisation(seed: int, device: torch.device):
    x, y = torch.randn(1, 6, 64, device=device) * 3 + 2, torch.randn(2, 6, 64, device=device).bfloat16()
    gate = torch.randn(1, 1, 64, device=device)
    norm = Norm(*torch.randn(2, 1, 1, 64, device=device), 1e-6)
    new, got = nvfp4_gemm.add_normalize(x, y, gate, norm)
    want_new, normed = norm_modulate.add_normalize(x, y, gate, norm, torch.float32)
    assert torch.equal(new, want_new)
    same(got, nvfp4_gemm.quantize_rows(normed))
    assert relative_error(got.float(), normed) < ROUNDING
    same(
        nvfp4_gemm.normalize(x, norm),
        nvfp4_gemm.quantize_rows(norm_modulate.normalize(x, norm, torch.float32)),
    )
    same(
        nvfp4_gemm.gelu_quantize(y),
        nvfp4_gemm.quantize_rows(F.gelu(y.float(), approximate="tanh")),
    )


def same(got: Blocks, want: Blocks) -> None:
    assert torch.equal(got.data, want.data)
    assert torch.equal(got.scale.view(torch.uint8), want.scale.view(torch.uint8))
    assert torch.equal(got.outer, want.outer)


def test_stored_bytes_are_what_is_stored(device: torch.device):
    weight = torch.ones(6, 64, device=device)
    for numbers in (fp8_gemm, nvfp4_gemm):
        kept = vars(numbers.quantize_weight(weight)).values()
        stored = sum(part.numel() * part.element_size() for part in kept if isinstance(part, Tensor))
        assert stored == numbers.stored_bytes(6, 64)
    assert nvfp4_gemm.stored_bytes(6, 64) < 0.6 * fp8_gemm.stored_bytes(6, 64)


def test_the_emulation_is_what_a_cpu_runs():
    x = nvfp4_gemm.quantize_rows(torch.randn(3, 32))
    weight = nvfp4_gemm.quantize_weight(torch.randn(16, 32))
    want = reference.linear(x, weight, None, torch.float32)
    assert torch.equal(nvfp4_gemm.linear(x, weight, None, torch.float32), want)

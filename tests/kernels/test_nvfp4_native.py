"""What can be known of Blackwell's path without a Blackwell: layouts, torch's own checks, who takes it.

The path itself was never run. That torch takes the call is asked of torch's shape checks, on tensors without
memory, for which they are CUDA's; that its operands mean what they should, of a stand-in for
`torch._scaled_mm` that reads them by the published formulas.
"""

import pytest
import torch
from torch import Tensor

from engine.presets import FourBit
from kernels import nvfp4_gemm
from kernels.nvfp4_gemm import Blocks, blackwell
from kernels.nvfp4_gemm.layout import swizzle, unswizzle
from tests.kernels.check import relative_error

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def place(row: int, column: int, columns: int) -> int:
    """Where cuBLAS looks for a scale: "1D Block Scaling Factors Layout" in its documentation."""
    tile = row // 128 * (-(-columns // 4)) + column // 4
    return tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + column % 4


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (128, 4), (129, 5), (300, 9)])
def test_scales_lie_where_the_published_formula_says(seed: int, rows: int, columns: int):
    scale = torch.randint(1, 127, (rows, columns), dtype=torch.uint8).view(torch.float8_e4m3fn)
    flat = swizzle(scale)
    assert flat.shape == (-(-rows // 128) * -(-columns // 4) * 512,)
    assert flat.is_contiguous()
    places = [[place(row, column, columns) for column in range(columns)] for row in range(rows)]
    assert torch.equal(flat.view(torch.uint8)[torch.tensor(places)], scale.view(torch.uint8))
    assert int((flat.view(torch.uint8) != 0).sum()) == rows * columns  # zeros where padded
    assert torch.equal(unswizzle(flat, rows, columns).view(torch.uint8), scale.view(torch.uint8))


def without_memory(rows: int, width: int) -> Blocks:
    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    return Blocks(
        empty(rows, width // 2, dtype=torch.uint8),
        empty(rows, width // 16, dtype=torch.uint8).view(torch.float8_e4m3fn),
        empty(rows, dtype=torch.float32),
    )


def test_torch_takes_the_call(monkeypatch: pytest.MonkeyPatch):
    x, weight = without_memory(77, 96), without_memory(160, 96)
    got = blackwell.linear(x, weight, torch.empty(160, device="meta"), torch.bfloat16)
    assert (got.shape, got.dtype) == ((77, 160), torch.bfloat16)
    with pytest.raises(RuntimeError, match="divisible by 16"):
        blackwell.linear(without_memory(77, 48), without_memory(160, 48), None, torch.bfloat16)
    monkeypatch.setattr(blackwell, "swizzle", lambda scale: scale.reshape(-1))
    with pytest.raises(RuntimeError, match="should have 1024 elements"):
        blackwell.linear(x, weight, None, torch.bfloat16)


def by_the_book(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype) -> Tensor:
    """What cuBLASLt computes of these bytes: e2m1 pairs, low half first, and scales in tiles."""

    def values(packed: Tensor, scale: Tensor) -> Tensor:
        rows, columns = packed.shape[0], packed.shape[1] // 8
        pairs = packed.contiguous().view(torch.uint8).int()
        codes = torch.stack([pairs & 15, pairs >> 4], dim=-1).flatten(1)
        places = [[place(row, column, columns) for column in range(columns)] for row in range(rows)]
        scales = scale.view(torch.uint8)[torch.tensor(places)].view(torch.float8_e4m3fn).float()
        return torch.tensor(E2M1)[codes] * scales.repeat_interleave(16, dim=1)

    assert a.dtype == b.dtype == torch.float4_e2m1fn_x2
    return (values(a, scale_a) @ values(b.t(), scale_b).t()).to(out_dtype)


@pytest.mark.parametrize("shape", [(130, 64), (2, 5, 96)])
def test_its_operands_mean_what_the_emulation_multiplies(
    seed: int, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]
):
    x = nvfp4_gemm.quantize_rows(torch.randn(shape))
    weight = nvfp4_gemm.quantize_weight(torch.randn(144, shape[-1]))
    bias = torch.randn(144)
    monkeypatch.setattr(torch, "_scaled_mm", by_the_book)
    got = blackwell.linear(x, weight, bias, torch.float32)
    want = nvfp4_gemm.linear(x, weight, bias, torch.float32)
    assert got.shape == (*shape[:-1], 144)
    assert relative_error(got, want) < 3e-3  # the inner product is rounded to bf16
    assert blackwell.linear(x, weight, None, torch.bfloat16).dtype == torch.bfloat16


def test_only_a_blackwell_takes_it(monkeypatch: pytest.MonkeyPatch):
    cuda = torch.device("cuda")
    assert not nvfp4_gemm.native(torch.device("cpu"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for capability, native in {(9, 0): False, (8, 9): False, (10, 0): True, (12, 0): True}.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert nvfp4_gemm.native(cuda) is native
    for toolkit in ("12.6", None):
        monkeypatch.setattr(torch.version, "cuda", toolkit)
        assert not nvfp4_gemm.native(cuda)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert nvfp4_gemm.native(cuda)
    monkeypatch.delattr(torch, "float4_e2m1fn_x2")
    assert not nvfp4_gemm.native(cuda)
    assert FourBit.capability == blackwell.CAPABILITY  # what is offered is what runs

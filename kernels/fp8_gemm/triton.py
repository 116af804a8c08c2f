# Triton kernels carry no annotations; the launchers below them do.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""The passes that make a product's 8-bit operand, in Triton: one program a row, read once, written once.

LayerNorm + modulation (with the residual's update before it) and GELU end in the quantisation, so no
half-precision copy goes to memory. A feature costs 9 bytes with fp32 x and bf16 y in the update (x and y
read, x and the copy written: 11), 3 bytes with GELU of bf16.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fp8_gemm.rows import E4M3, Rows
from kernels.norm_modulate.norm import Norm
from kernels.norm_modulate.triton import Operands, normed_rows
from kernels.tables import setting

DEFAULT = {"warps": 8}


@triton.jit
def _store_quantized(value, out_ptr, factor_ptr, at, row, valid, stored):
    """Write [1, BLOCK] values as e4m3 over their largest magnitude, and the scale; NaN stays NaN."""
    largest = tl.max(tl.where(valid, tl.abs(value), 0.0), axis=1)
    factor = tl.where(largest > 0, largest / 448.0, 1.0)
    scaled = value / factor[:, None]
    # Comparisons with NaN are false, so it passes both.
    scaled = tl.where(scaled > 448.0, 448.0, scaled)
    scaled = tl.where(scaled < -448.0, -448.0, scaled)
    tl.store(out_ptr + at, scaled.to(tl.float8e4nv), mask=valid)
    tl.store(factor_ptr + row, factor, mask=stored)


@triton.jit(do_not_specialize=["rows", "length", "split"])
def _norm_kernel(
    x_ptr,
    y_ptr,
    gate_ptr,
    shift_ptr,
    scale_ptr,
    new_ptr,
    out_ptr,
    factor_ptr,
    rows,
    length,
    split,
    x_batch_stride,
    gate_batch_stride,
    norm_batch_stride,
    eps,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    OFFSET: tl.constexpr,
    ADD: tl.constexpr,
    GATE: tl.constexpr,
    GATE_SHARED: tl.constexpr,
    GATE_SETS: tl.constexpr,
    NORM_SHARED: tl.constexpr,
    NORM_SETS: tl.constexpr,
):
    row = tl.program_id(0) + tl.arange(0, 1)
    value, at, valid = normed_rows(
        x_ptr, y_ptr, gate_ptr, shift_ptr, scale_ptr, new_ptr, row, rows, length, split, x_batch_stride,
        gate_batch_stride, norm_batch_stride, eps, D, BLOCK, OFFSET, ADD, GATE, GATE_SHARED, GATE_SETS,
        NORM_SHARED, NORM_SETS,
    )  # fmt: skip
    _store_quantized(value, out_ptr, factor_ptr, at, row, valid, row < rows)


@triton.jit
def _rows_kernel(x_ptr, out_ptr, factor_ptr, N: tl.constexpr, BLOCK: tl.constexpr, GELU: tl.constexpr):
    row = tl.program_id(0) + tl.arange(0, 1)
    cols = tl.arange(0, BLOCK)
    valid = (row >= 0)[:, None] & (cols < N)[None, :]
    at = row.to(tl.int64)[:, None] * N + cols[None, :]
    value = tl.load(x_ptr + at, mask=valid, other=0.0).to(tl.float32)
    if GELU:  # 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), as x times a sigmoid
        inner = 1.5957691216057308 * (value + 0.044715 * value * value * value)
        value = value / (1.0 + tl.exp(-inner))
    _store_quantized(value, out_ptr, factor_ptr, at, row, valid, row >= 0)


def _empty(shape: torch.Size, device: torch.device) -> Rows:
    data = torch.empty(shape, dtype=torch.uint8, device=device).view(E4M3)
    return Rows(data, torch.empty(shape[:-1], dtype=torch.float32, device=device))


def _by_rows(x: Tensor, gelu: bool) -> Rows:
    x = x.contiguous()
    out, width = _empty(x.shape, x.device), x.shape[-1]
    if x.numel() == 0:
        return out
    tuned = setting("quantize", f"{width}", x.device, {"warps": 16 if width > 8192 else 8})
    _rows_kernel[(x.numel() // width,)](
        x, out.data, out.scale, N=width, BLOCK=triton.next_power_of_2(width), GELU=gelu,
        num_warps=tuned["warps"],
    )  # fmt: skip
    return out


def quantize_rows(x: Tensor) -> Rows:
    """Each row of x [..., K] over its largest magnitude, as e4m3."""
    return _by_rows(x, gelu=False)


def gelu_quantize(x_BLN: Tensor) -> Rows:
    """gelu(x), the tanh form, quantised by rows."""
    return _by_rows(x_BLN, gelu=True)


def _launch(x_BLD: Tensor, y_BLD: Tensor | None, gate_BSD: Tensor | None, norm: Norm) -> tuple[Tensor, Rows]:
    operands = Operands.of(x_BLD, y_BLD, gate_BSD, norm)
    out = _empty(operands.shape, x_BLD.device)
    if operands.shape.numel() == 0:
        return operands.new, out
    batch, length, dim = operands.shape
    tuned = setting("norm_quantize", f"{dim}", x_BLD.device, DEFAULT)
    _norm_kernel[(batch * length,)](
        *operands.tensors,
        out.data,
        out.scale,
        *operands.numbers,
        num_warps=tuned["warps"],
        **operands.constants,
    )
    return operands.new, out


def normalize(x_BLD: Tensor, norm: Norm) -> Rows:
    """LN(x) * (offset + scale) + shift, quantised by rows."""
    return _launch(x_BLD, None, None, norm)[1]


def add_normalize(x_BLD: Tensor, y_BLD: Tensor, gate_BSD: Tensor | None, norm: Norm) -> tuple[Tensor, Rows]:
    """(x + y * gate in x's dtype, its norm quantised by rows); B is y's where x's is 1."""
    return _launch(x_BLD, y_BLD, gate_BSD, norm)

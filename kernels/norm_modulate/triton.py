# Triton kernels carry no annotations; the launchers below them do.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""Layer norm and modulation, with the residual's update in the same pass, in Triton.

One program takes ROWS tokens whole, so the residual is read and written once and the mean and variance
need no second pass over memory. Memory-bound: for fp32 x and bf16 y and out, 12 bytes a feature fused,
6 without the update. Modulation vectors are read once a program where all its tokens share them.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.norm_modulate.norm import Norm
from kernels.tables import setting

DEFAULT = {"rows": 1, "warps": 8}


@triton.jit
def _vector(ptr, batch_stride, batch, second, cols, valid, D: tl.constexpr, SHARED: tl.constexpr):
    """A modulation vector as [1, BLOCK] where tokens share it, else each token's, [ROWS, BLOCK]."""
    if SHARED:
        vector = tl.load(ptr + cols[None, :], mask=(cols < D)[None, :], other=0.0)
    else:
        start = batch.to(tl.int64) * batch_stride + second * D
        vector = tl.load(ptr + start[:, None] + cols[None, :], mask=valid, other=0.0)
    return vector.to(tl.float32)


@triton.jit
def normed_rows(
    x_ptr,
    y_ptr,
    gate_ptr,
    shift_ptr,
    scale_ptr,
    new_ptr,
    row,
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
    """Tokens `row` [ROWS] after the update and the norm: (values, where they lie, which of them exist)."""
    cols = tl.arange(0, BLOCK)
    valid = (row < rows)[:, None] & (cols < D)[None, :]
    batch = row // length
    token = row - batch * length
    after = (token >= split).to(tl.int32)
    at = row.to(tl.int64)[:, None] * D + cols[None, :]
    x_at = (batch.to(tl.int64) * x_batch_stride + token.to(tl.int64) * D)[:, None] + cols[None, :]

    x = tl.load(x_ptr + x_at, mask=valid, other=0.0).to(tl.float32)
    if ADD:
        y = tl.load(y_ptr + at, mask=valid, other=0.0).to(tl.float32)
        if GATE:
            second = after * (GATE_SETS - 1)
            y *= _vector(gate_ptr, gate_batch_stride, batch, second, cols, valid, D, GATE_SHARED)
        # Round before the norm: the copy is the norm of the residual that is stored.
        new = (x + y).to(new_ptr.dtype.element_ty)
        tl.store(new_ptr + at, new, mask=valid)
        x = new.to(tl.float32)

    mean = tl.sum(x, axis=1) / D
    centred = tl.where(valid, x - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, axis=1) / D
    normed = centred * tl.rsqrt(variance + eps)[:, None]
    second = after * (NORM_SETS - 1)
    scale = _vector(scale_ptr, norm_batch_stride, batch, second, cols, valid, D, NORM_SHARED)
    shift = _vector(shift_ptr, norm_batch_stride, batch, second, cols, valid, D, NORM_SHARED)
    return normed * (OFFSET + scale) + shift, at, valid


@triton.jit(do_not_specialize=["rows", "length", "split"])
def _norm_kernel(
    x_ptr,
    y_ptr,
    gate_ptr,
    shift_ptr,
    scale_ptr,
    new_ptr,
    out_ptr,
    rows,
    length,
    split,
    x_batch_stride,
    gate_batch_stride,
    norm_batch_stride,
    eps,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    OFFSET: tl.constexpr,
    ADD: tl.constexpr,
    GATE: tl.constexpr,
    GATE_SHARED: tl.constexpr,
    GATE_SETS: tl.constexpr,
    NORM_SHARED: tl.constexpr,
    NORM_SETS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    out, at, valid = normed_rows(
        x_ptr, y_ptr, gate_ptr, shift_ptr, scale_ptr, new_ptr, row, rows, length, split, x_batch_stride,
        gate_batch_stride, norm_batch_stride, eps, D, BLOCK, OFFSET, ADD, GATE, GATE_SHARED, GATE_SETS,
        NORM_SHARED, NORM_SETS,
    )  # fmt: skip
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=valid)


def _sets(v_BSD: Tensor, name: str, batch: int, dim: int) -> tuple[Tensor, int, int]:
    """(contiguous vectors, number of sets, batch stride in elements: 0 when they broadcast)."""
    if v_BSD.dim() != 3 or v_BSD.shape[0] not in (1, batch) or v_BSD.shape[1] > 2 or v_BSD.shape[2] != dim:
        raise ValueError(f"{name} of shape {tuple(v_BSD.shape)}: expected [1 or {batch}, 1 or 2, {dim}]")
    v_BSD = v_BSD.contiguous()
    return v_BSD, v_BSD.shape[1], 0 if v_BSD.shape[0] == 1 else v_BSD.stride(0)


@dataclass(frozen=True)
class Operands:
    """What kernels around `normed_rows` are launched with."""

    new: Tensor  # the updated residual; x itself, unwritten, where nothing is added
    shape: torch.Size
    tensors: tuple[Tensor, ...]  # x, y, gate, shift, scale, new
    numbers: tuple[float, ...]  # rows, length, split, three batch strides, eps
    constants: dict[str, Any]

    @staticmethod
    def of(x_BLD: Tensor, y_BLD: Tensor | None, gate_BSD: Tensor | None, norm: Norm) -> "Operands":
        """Checked and laid out; raises ValueError for shapes that don't fit together."""
        x_BLD = x_BLD.contiguous()
        shape = x_BLD.shape if y_BLD is None else y_BLD.shape
        batch, length, dim = shape
        if x_BLD.shape[1:] != shape[1:] or x_BLD.shape[0] not in (1, batch):
            raise ValueError(
                f"residual {tuple(x_BLD.shape)} doesn't broadcast to the branch's {tuple(shape)}"
            )
        scale, norm_sets, norm_stride = _sets(norm.scale, "scale", batch, dim)
        shift, shift_sets, shift_stride = _sets(norm.shift, "shift", batch, dim)
        if (norm_sets, norm_stride) != (shift_sets, shift_stride):
            raise ValueError(f"scale {tuple(scale.shape)} and shift {tuple(shift.shape)} differ")
        gate, gate_sets, gate_stride = scale, 1, 0
        if gate_BSD is not None:
            gate, gate_sets, gate_stride = _sets(gate_BSD, "gate", batch, dim)
        new = x_BLD if y_BLD is None else torch.empty(shape, dtype=x_BLD.dtype, device=x_BLD.device)
        y_BLD = x_BLD if y_BLD is None else y_BLD.contiguous()
        x_stride = 0 if x_BLD.shape[0] == 1 else length * dim
        return Operands(
            new,
            shape,
            (x_BLD, y_BLD, gate, shift, scale, new),
            (batch * length, length, norm.split, x_stride, gate_stride, norm_stride, norm.eps),
            {
                "D": dim,
                "BLOCK": triton.next_power_of_2(dim),
                "OFFSET": norm.offset,
                "ADD": new is not x_BLD,
                "GATE": gate_BSD is not None,
                "GATE_SHARED": gate_sets == 1 and gate_stride == 0,
                "GATE_SETS": gate_sets,
                "NORM_SHARED": norm_sets == 1 and norm_stride == 0,
                "NORM_SETS": norm_sets,
            },
        )


def _launch(
    x_BLD: Tensor, y_BLD: Tensor | None, gate_BSD: Tensor | None, norm: Norm, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    operands = Operands.of(x_BLD, y_BLD, gate_BSD, norm)
    out = torch.empty(operands.shape, dtype=dtype, device=x_BLD.device)
    if out.numel() == 0:
        return operands.new, out
    batch, length, dim = operands.shape
    tuned = setting("norm_modulate", f"{dim}", x_BLD.device, DEFAULT)
    _norm_kernel[(triton.cdiv(batch * length, tuned["rows"]),)](
        *operands.tensors,
        out,
        *operands.numbers,
        ROWS=tuned["rows"],
        num_warps=tuned["warps"],
        **operands.constants,
    )
    return operands.new, out


def normalize(x_BLD: Tensor, norm: Norm, dtype: torch.dtype) -> Tensor:
    """LN(x) * (offset + scale) + shift as `dtype`, [B, L, D]."""
    return _launch(x_BLD, None, None, norm, dtype)[1]


def add_normalize(
    x_BLD: Tensor, y_BLD: Tensor, gate_BSD: Tensor | None, norm: Norm, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(x + y * gate in x's dtype, its norm as `dtype`), both [B, L, D]; B is y's where x's is 1."""
    return _launch(x_BLD, y_BLD, gate_BSD, norm, dtype)

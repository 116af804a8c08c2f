# Triton kernels carry no annotations; the launchers below them do.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""RMSNorm over the full width, 3-D RoPE and the all-to-all's layout in one pass, in Triton.

One program takes q, k or v of ROWS tokens: it reads a slice of the packed product once and writes each
head's features to the rank that will attend with it. Memory-bound: 4 bytes a feature in bf16.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.qk_norm_rope.layout import SendLayout
from kernels.tables import setting

DEFAULT = {"rows": 1, "warps": 4}


@triton.jit(do_not_specialize=["rows", "length"])
def _qk_kernel(
    x_ptr,
    weight_q_ptr,
    weight_k_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    rows,
    length,
    x_row_stride,
    part_stride,
    eps,
    D: tl.constexpr,
    K: tl.constexpr,
    RANKS: tl.constexpr,
    WIDTH: tl.constexpr,  # features of one rank in the first group of heads
    WIDTH_2: tl.constexpr,  # and in the second, 0 if there is none
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    ROPE: tl.constexpr,
):
    part = tl.program_id(1)  # 0 q, 1 k, 2 v
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    valid = (row < rows)[:, None] & (cols < D)[None, :]
    x_at = row.to(tl.int64)[:, None] * x_row_stride + part * D + cols[None, :]
    entry, token = (row // length).to(tl.int64)[:, None], row % length
    # [entry, rank, token, feature of the rank], one such block a group of heads
    rank, within = (cols // WIDTH)[None, :], (cols % WIDTH)[None, :]
    out_at = ((entry * RANKS + rank) * length + token[:, None]) * WIDTH + within
    if WIDTH_2 > 0:
        beyond = cols - RANKS * WIDTH
        rank, within = (beyond // WIDTH_2)[None, :], (beyond % WIDTH_2)[None, :]
        second_at = ((entry * RANKS + rank) * length + token[:, None]) * WIDTH_2 + within
        second_at += rows.to(tl.int64) * (RANKS * WIDTH)
        out_at = tl.where((beyond >= 0)[None, :], second_at, out_at)
    out_at += part.to(tl.int64) * part_stride

    loaded = tl.load(x_ptr + x_at, mask=valid, other=0.0)
    if part == 2:
        tl.store(out_ptr + out_at, loaded, mask=valid)
    else:
        x = loaded.to(tl.float32)
        weight_ptr = weight_q_ptr
        if part == 1:
            weight_ptr = weight_k_ptr
        weight = tl.load(weight_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)
        x = x * inverse[:, None] * weight[None, :]
        if ROPE:
            pair = tl.arange(0, BLOCK // 2)
            table_at = token[:, None] * (K // 2) + (pair % (K // 2))[None, :]
            inside = (row < rows)[:, None] & (pair < D // 2)[None, :]
            cos = tl.load(cos_ptr + table_at, mask=inside, other=0.0)
            sin = tl.load(sin_ptr + table_at, mask=inside, other=0.0)
            even, odd = tl.split(tl.reshape(x, (ROWS, BLOCK // 2, 2)))
            x = tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (ROWS, BLOCK))
        tl.store(out_ptr + out_at, x.to(out_ptr.dtype.element_ty), mask=valid)


def _check_rows(x_BLD: Tensor, what: str) -> None:
    if x_BLD.stride(-1) != 1 or x_BLD.stride(0) != x_BLD.shape[1] * x_BLD.stride(1):
        raise ValueError(f"{what} has strides {x_BLD.stride()}: expected evenly spaced contiguous rows")


def rms_norm(x_BLD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """RMSNorm over the full width (all heads together), contiguous, in x's dtype."""
    _check_rows(x_BLD, "rms_norm's input")
    out = torch.empty(x_BLD.shape, dtype=x_BLD.dtype, device=x_BLD.device)
    _launch("rms_norm", x_BLD, weight_D, weight_D, None, SendLayout(1, (1,)), eps, out, 1)
    return out


def norm_rope(
    x_BLD: Tensor, weight_D: Tensor, rope: tuple[Tensor, Tensor], layout: SendLayout, eps: float
) -> Tensor:
    """q or k alone: normed, rotated, [B, L, H, K] elements in `layout`."""
    _check_rows(x_BLD, "norm_rope's input")
    batch, length, dim = x_BLD.shape
    _check_rope(dim, length, rope, layout)
    shape = (batch, length, layout.heads, dim // layout.heads)
    out = torch.empty(shape, dtype=x_BLD.dtype, device=x_BLD.device)
    _launch("qk_norm_rope", x_BLD, weight_D, weight_D, rope, layout, eps, out, 1)
    return out


def qk_norm_rope(
    qkv_BLD: Tensor,
    weight_q_D: Tensor,
    weight_k_D: Tensor,
    rope: tuple[Tensor, Tensor],
    layout: SendLayout,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Packed q, k, v [B, L, 3 * D] -> each in `layout`; with one rank v stays a view of the product."""
    batch, length, packed = qkv_BLD.shape
    dim = packed // 3
    _check_rows(qkv_BLD, "the packed product")
    if packed % 3:
        raise ValueError(f"{packed} features are no packed q, k and v")
    _check_rope(dim, length, rope, layout)
    plain = layout.ranks == 1 and len(layout.groups) == 1
    parts = 2 if plain else 3
    shape = (batch, length, layout.heads, dim // layout.heads)
    out = torch.empty((parts, *shape), dtype=qkv_BLD.dtype, device=qkv_BLD.device)
    _launch("qk_norm_rope", qkv_BLD, weight_q_D, weight_k_D, rope, layout, eps, out, parts)
    if plain:
        return out[0], out[1], qkv_BLD[..., 2 * dim :].view(shape)
    return out[0], out[1], out[2]


def _check_rope(dim: int, length: int, rope: tuple[Tensor, Tensor], layout: SendLayout) -> None:
    cos, sin = rope
    head = dim // layout.heads
    if dim % layout.heads or head % 2 or not 1 <= len(layout.groups) <= 2:
        raise ValueError(
            f"{dim} features don't divide into {layout.heads} even heads in groups of {layout.groups} "
            f"over {layout.ranks} ranks (one or two groups)"
        )
    if cos.shape != (length, head // 2) or sin.shape != cos.shape or cos.dtype != torch.float32:
        raise ValueError(
            f"RoPE tables {tuple(cos.shape)} {cos.dtype}: "
            f"expected fp32 {(length, head // 2)}, one row a token"
        )


def _launch(
    table: str,
    x_BLD: Tensor,
    weight_q_D: Tensor,
    weight_k_D: Tensor,
    rope: tuple[Tensor, Tensor] | None,
    layout: SendLayout,
    eps: float,
    out: Tensor,
    parts: int,
) -> None:
    """One program for every few rows of each part of x: q alone, or q, k and v side by side."""
    if out.numel() == 0:
        return
    batch, length = x_BLD.shape[:2]
    dim = out.numel() // (parts if out.ndim == 5 else 1) // (batch * length)
    head = dim // layout.heads
    cos, sin = (weight_q_D, weight_q_D) if rope is None else (rope[0].contiguous(), rope[1].contiguous())
    tuned = setting(table, f"{dim}", x_BLD.device, DEFAULT)
    _qk_kernel[(triton.cdiv(batch * length, tuned["rows"]), parts)](
        x_BLD,
        weight_q_D.contiguous(),
        weight_k_D.contiguous(),
        cos,
        sin,
        out,
        batch * length,
        length,
        x_BLD.stride(1),
        batch * length * dim,
        eps,
        D=dim,
        K=head if rope is not None else 2,
        RANKS=layout.ranks,
        WIDTH=layout.groups[0] * head,
        WIDTH_2=layout.groups[1] * head if len(layout.groups) == 2 else 0,
        BLOCK=triton.next_power_of_2(dim),
        ROWS=tuned["rows"],
        ROPE=rope is not None,
        num_warps=tuned["warps"],
    )

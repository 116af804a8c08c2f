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
    rank_stride,
    eps,
    D: tl.constexpr,
    K: tl.constexpr,
    RANK_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    ROPE: tl.constexpr,
):
    part = tl.program_id(1)  # 0 q, 1 k, 2 v
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    valid = (row < rows)[:, None] & (cols < D)[None, :]
    x_at = row.to(tl.int64)[:, None] * x_row_stride + part * D + cols[None, :]
    rank = cols // RANK_WIDTH
    within = rank.to(tl.int64) * rank_stride + cols % RANK_WIDTH
    out_at = part.to(tl.int64) * part_stride + row.to(tl.int64)[:, None] * RANK_WIDTH + within[None, :]

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
            token = row % length
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
    batch, length, dim = x_BLD.shape
    out = torch.empty(x_BLD.shape, dtype=x_BLD.dtype, device=x_BLD.device)
    if out.numel() == 0:
        return out
    tuned = setting("rms_norm", f"{dim}", x_BLD.device, DEFAULT)
    _qk_kernel[(triton.cdiv(batch * length, tuned["rows"]), 1)](
        x_BLD,
        weight_D,
        weight_D,
        weight_D,
        weight_D,
        out,
        batch * length,
        length,
        x_BLD.stride(1),
        0,
        0,
        eps,
        D=dim,
        K=2,
        RANK_WIDTH=dim,
        BLOCK=triton.next_power_of_2(dim),
        ROWS=tuned["rows"],
        ROPE=False,
        num_warps=tuned["warps"],
    )
    return out


def qk_norm_rope(
    qkv_BLD: Tensor,
    weight_q_D: Tensor,
    weight_k_D: Tensor,
    rope: tuple[Tensor, Tensor],
    heads: int,
    ranks: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Packed q, k, v [B, L, 3 * D] -> each [R, B, L, G, K]; with one rank v stays a view of the product."""
    batch, length, packed = qkv_BLD.shape
    dim = packed // 3
    head = dim // heads
    cos, sin = rope
    _check_rows(qkv_BLD, "the packed product")
    if heads % ranks or packed != 3 * heads * head or head % 2:
        raise ValueError(f"{packed} features don't divide into 3 x {heads} even heads over {ranks} ranks")
    if cos.shape != (length, head // 2) or sin.shape != cos.shape or cos.dtype != torch.float32:
        raise ValueError(
            f"RoPE tables {tuple(cos.shape)} {cos.dtype}: "
            f"expected fp32 {(length, head // 2)}, one row a token"
        )
    parts = 2 if ranks == 1 else 3
    shape = (parts, ranks, batch, length, heads // ranks, head)
    out = torch.empty(shape, dtype=qkv_BLD.dtype, device=qkv_BLD.device)
    if out.numel():
        tuned = setting("qk_norm_rope", f"{dim}", qkv_BLD.device, DEFAULT)
        _qk_kernel[(triton.cdiv(batch * length, tuned["rows"]), parts)](
            qkv_BLD,
            weight_q_D.contiguous(),
            weight_k_D.contiguous(),
            cos.contiguous(),
            sin.contiguous(),
            out,
            batch * length,
            length,
            qkv_BLD.stride(1),
            out.stride(0),
            out.stride(1),
            eps,
            D=dim,
            K=head,
            RANK_WIDTH=dim // ranks,
            BLOCK=triton.next_power_of_2(dim),
            ROWS=tuned["rows"],
            ROPE=True,
            num_warps=tuned["warps"],
        )
    if ranks == 1:
        return out[0], out[1], qkv_BLD[..., 2 * dim :].view(1, batch, length, heads, head)
    return out[0], out[1], out[2]

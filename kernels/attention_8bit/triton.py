# Triton kernels carry no annotations; the launchers below them do.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""Attention with int8 q k^T and e4m3 P V, in Triton. The method is in `kernels.attention_8bit.reference`.

One program holds BM queries of a head and walks over blocks of BN keys with an online softmax. e4m3 tensor
cores keep few bits of what they add up, so each block's P V is a product of its own and joins the fp32
output in registers. v lies with its tokens innermost, as those tensor cores want their second operand.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention_8bit.reference import (
    E4M3,
    LARGEST,
    LOG2E,
    Blocks,
    Channels,
    largest_by_channel,
    mean_over_tokens,
)
from kernels.tables import setting

HEADS = (16, 32, 64, 128)  # head dimensions that it takes
TOKENS = 64  # of a program that turns v


@dataclass(frozen=True)
class Tile:
    """How one program works: queries, keys a block, depth of the pipeline."""

    m: int = 128
    n: int = 128
    warps: int = 8
    stages: int = 3


@triton.jit
def _blocks_kernel(
    x_ptr, mean_ptr, out_ptr, scale_ptr, length, heads, stride_b, stride_l, stride_h,
    BLOCK: tl.constexpr, K: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = block * BLOCK + tl.arange(0, BLOCK)
    col = tl.arange(0, K)
    valid = (row < length)[:, None]
    at = batch.to(tl.int64) * stride_b + row.to(tl.int64)[:, None] * stride_l + head * stride_h + col[None, :]
    x = tl.load(x_ptr + at, mask=valid, other=0.0).to(tl.float32)
    place = batch * heads + head
    if MEAN:
        x -= tl.load(mean_ptr + place * K + col)[None, :]
    x = tl.where(valid, x, 0.0)
    largest = tl.max(tl.max(tl.abs(x), axis=1), axis=0)
    # The last sum is 0, or NaN where x isn't finite: int8 can't tell, and `max` passes NaN over.
    scale = tl.where(largest > 0, largest / 127.0, 1.0) + tl.sum(tl.sum(x * 0.0, axis=1), axis=0)
    scaled = x / scale
    rounded = (scaled + tl.where(scaled < 0, -0.5, 0.5)).to(tl.int8)
    out = (place.to(tl.int64) * length + row)[:, None] * K + col[None, :]
    tl.store(out_ptr + out, rounded, mask=valid)
    tl.store(scale_ptr + place * tl.num_programs(0) + block, scale)


@triton.jit
def _channels_kernel(
    v_ptr, scale_ptr, out_ptr, length, padded, heads, stride_b, stride_l, stride_h,
    BLOCK: tl.constexpr, K: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = block * BLOCK + tl.arange(0, BLOCK)
    col = tl.arange(0, K)
    token = row
    if SLOTS:  # see `reference.slots`
        token = row // 16 * 16 + row // 2 % 2 * 8 + row % 16 // 4 * 2 + row % 2
    at = batch.to(tl.int64) * stride_b + token.to(tl.int64)[:, None] * stride_l
    at += head * stride_h + col[None, :]
    v = tl.load(v_ptr + at, mask=(token < length)[:, None], other=0.0).to(tl.float32)
    place = (batch * heads + head).to(tl.int64)
    v = v / tl.load(scale_ptr + place * K + col)[None, :]
    v = tl.where(v > 448.0, 448.0, v)
    v = tl.where(v < -448.0, -448.0, v)
    out = (place * K + col)[:, None] * padded + row[None, :]
    tl.store(out_ptr + out, tl.trans(v).to(tl.float8e4nv), mask=(row < padded)[None, :])


@triton.jit
def _over_block(
    q, highest, total, acc, k_ptr, k_scale_ptr, v_ptr, first_key, tokens, padded, of_query, shift,
    BN: tl.constexpr, K: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """The online softmax over one block of keys; `shift` raises P to e4m3's range within the exponent."""
    col, now_key = tl.arange(0, K), first_key + tl.arange(0, BN)
    k_at = now_key.to(tl.int64)[:, None] * K + col[None, :]
    v_at = col.to(tl.int64)[None, :] * padded + now_key[:, None]  # [BN, K], its tokens innermost
    if TAIL:
        k = tl.load(k_ptr + k_at, mask=(now_key < tokens)[:, None], other=0)
        v = tl.load(v_ptr + v_at, mask=(now_key < padded)[:, None], other=0.0)
    else:
        k, v = tl.load(k_ptr + k_at), tl.load(v_ptr + v_at)
    scores = tl.dot(q, tl.trans(k)).to(tl.float32)
    if TAIL:
        scores = tl.where((now_key < tokens)[None, :], scores, float("-inf"))
    scale = of_query * tl.load(k_scale_ptr + first_key // BN)
    # A row's largest product is its largest score, as scales are positive: one product a row, not a score.
    now = tl.maximum(highest, tl.max(scores, axis=1) * scale)
    p = tl.exp2(scores * scale - (now - shift)[:, None])
    fade = tl.exp2(highest - now)
    total = total * fade + tl.sum(p, axis=1)
    product = tl.dot(p.to(tl.float8e4nv), v, max_num_imprecise_acc=BN)
    return now, total, acc * fade[:, None] + product


@triton.jit(do_not_specialize=["queries", "tokens"])
def _attention_kernel(
    q_ptr, q_scale_ptr, k_ptr, k_scale_ptr, v_ptr, v_scale_ptr, out_ptr,
    queries, tokens, padded, heads, softmax_scale, shift,
    BM: tl.constexpr, BN: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    place = (batch * heads + head).to(tl.int64)
    row = block * BM + tl.arange(0, BM)
    col = tl.arange(0, K)
    q_at = (place * queries + row)[:, None] * K + col[None, :]
    q = tl.load(q_ptr + q_at, mask=(row < queries)[:, None], other=0)
    of_query = tl.load(q_scale_ptr + place * tl.num_programs(0) + block) * softmax_scale
    k_ptr += place * tokens * K
    k_scale_ptr += place * tl.cdiv(tokens, BN)
    v_ptr += place * K * padded
    highest = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, K), tl.float32)
    whole = tokens // BN * BN
    for first in range(0, whole, BN):
        highest, total, acc = _over_block(
            q, highest, total, acc, k_ptr, k_scale_ptr, v_ptr, first, tokens, padded, of_query, shift,
            BN, K, False,
        )  # fmt: skip
    if whole < tokens:
        highest, total, acc = _over_block(
            q, highest, total, acc, k_ptr, k_scale_ptr, v_ptr, whole, tokens, padded, of_query, shift,
            BN, K, True,
        )  # fmt: skip
    of_channel = tl.load(v_scale_ptr + place * K + col)
    out = acc / total[:, None] * of_channel[None, :]
    # [B, L, H, K]
    out_at = ((batch.to(tl.int64) * queries + row) * heads + head)[:, None] * K + col[None, :]
    tl.store(out_ptr + out_at, out.to(out_ptr.dtype.element_ty), mask=(row < queries)[:, None])


def fits(q_BLHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor) -> bool:
    """Whether the kernel takes these: a head dimension of `HEADS`, elements of a head side by side."""
    inner = all(x.stride(-1) == 1 for x in (q_BLHK, k_BTHK, v_BTHK))
    return q_BLHK.shape[-1] in HEADS and inner and min(q_BLHK.numel(), k_BTHK.numel()) > 0


def quantize_blocks(x_BLHK: Tensor, mean_BHK: Tensor | None, block: int) -> Blocks:
    """See the reference."""
    batch, length, heads, width = x_BLHK.shape
    blocks = triton.cdiv(length, block)
    data = torch.empty((batch, heads, length, width), dtype=torch.int8, device=x_BLHK.device)
    scale = torch.empty((batch, heads, blocks), dtype=torch.float32, device=x_BLHK.device)
    _blocks_kernel[(blocks, heads, batch)](
        x_BLHK, scale if mean_BHK is None else mean_BHK, data, scale, length, heads, *x_BLHK.stride()[:3],
        BLOCK=block, K=width, MEAN=mean_BHK is not None, num_warps=4,
    )  # fmt: skip
    return Blocks(data, scale)


def quantize_channels(v_BTHK: Tensor, slots: bool = False) -> Channels:
    """See the reference; with `slots` the tokens lie as in `reference.slots`."""
    batch, length, heads, width = v_BTHK.shape
    padded = length + -length % 16
    data = torch.empty((batch, heads, width, padded), dtype=torch.uint8, device=v_BTHK.device).view(E4M3)
    scale = largest_by_channel(v_BTHK)
    _channels_kernel[(triton.cdiv(padded, TOKENS), heads, batch)](
        v_BTHK, scale, data, length, padded, heads, *v_BTHK.stride()[:3],
        BLOCK=TOKENS, K=width, SLOTS=slots, num_warps=4,
    )  # fmt: skip
    return Channels(data, scale)


def tuned_tile(width: int, device: torch.device) -> Tile:
    """What the device's table names for this head dimension, else the default."""
    return Tile(**{k: v for k, v in setting("attention_8bit", f"{width}", device, {}).items() if k != "ms"})


def attention(q_BLHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor, tile: Tile | None = None) -> Tensor:
    """softmax(q k^T / sqrt(K)) v in q's dtype, [B, L, H, K]."""
    if not fits(q_BLHK, k_BTHK, v_BTHK):
        raise ValueError(f"q {tuple(q_BLHK.shape)}: expected a head dimension of {HEADS}, contiguous heads")
    batch, queries, heads, width = q_BLHK.shape
    tokens = k_BTHK.shape[1]
    if tile is None:
        tile = tuned_tile(width, q_BLHK.device)
    q = quantize_blocks(q_BLHK, None, tile.m)
    k = quantize_blocks(k_BTHK, mean_over_tokens(k_BTHK), tile.n)
    v = quantize_channels(v_BTHK)
    out = torch.empty((batch, queries, heads, width), dtype=q_BLHK.dtype, device=q_BLHK.device)
    _attention_kernel[(triton.cdiv(queries, tile.m), heads, batch)](
        q.data, q.scale, k.data, k.scale, v.data, v.scale, out,
        queries, tokens, v.data.shape[-1], heads, LOG2E * width**-0.5, math.log2(LARGEST),
        BM=tile.m, BN=tile.n, K=width, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out

"""Attention with 8-bit operands as plain torch computes it, block by block as the kernel does.

After SageAttention 2 (arXiv:2411.10958): k loses its mean over the tokens (softmax does not see it, and what
is left has no outlier channels), q and k become int8 with a scale a block of tokens, P = exp(s - max) is in
[0, 1] and becomes e4m3 by the fixed scale 448, v becomes e4m3 with a scale a channel. Scores, sums and the
output accumulate in fp32.

Shapes: B batch, L query tokens, T key tokens, H heads, K head dimension; blocks of BM queries, BN keys.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.fp8_gemm.rows import decode

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class Blocks:
    """q or k in int8 with a scale a block of tokens."""

    data: Tensor  # [B, H, L, K] int8
    scale: Tensor  # [B, H, blocks] fp32


@dataclass(frozen=True)
class Channels:
    """v in e4m3 with a scale a channel, tokens innermost, padded with zeros to a multiple of 16."""

    data: Tensor  # [B, H, K, T padded] e4m3
    scale: Tensor  # [B, H, K] fp32


def mean_over_tokens(k_BTHK: Tensor) -> Tensor:
    """What k loses: [B, H, K] fp32."""
    return k_BTHK.mean(1, dtype=torch.float32)


def _scale(largest: Tensor, number: float) -> Tensor:
    """What maps `largest` to `number`; NaN where it isn't finite, as the numbers themselves can't tell."""
    scale = torch.where(largest > 0, largest / number, torch.ones_like(largest))
    return torch.where(largest.isfinite(), scale, torch.nan)


def quantize_blocks(x_BLHK: Tensor, mean_BHK: Tensor | None, block: int) -> Blocks:
    """(x - mean) over the largest magnitude of each block of tokens, rounded to the nearest int8."""
    x = x_BLHK.transpose(1, 2).float()
    if mean_BHK is not None:
        x = x - mean_BHK[:, :, None]
    length = x.shape[2]
    x = torch.unflatten(F.pad(x, (0, 0, 0, -length % block)), 2, (-1, block))
    largest = x.abs().amax((3, 4))
    scale = _scale(largest, 127.0)
    scaled = x / scale[..., None, None]
    rounded = (scaled + torch.where(scaled < 0, -0.5, 0.5)).to(torch.int8)  # towards zero after half a step
    return Blocks(rounded.flatten(2, 3)[:, :, :length].contiguous(), scale)


def largest_by_channel(v_BTHK: Tensor) -> Tensor:
    """The scale of each channel of v: [B, H, K] fp32."""
    return _scale(v_BTHK.abs().amax(1).float(), LARGEST)


def quantize_channels(v_BTHK: Tensor) -> Channels:
    """v over each channel's largest magnitude, as e4m3 with the tokens innermost."""
    scale = largest_by_channel(v_BTHK)
    scaled = v_BTHK.permute(0, 2, 3, 1).float() / scale[..., None]
    padded = F.pad(scaled.clamp(-LARGEST, LARGEST), (0, -scaled.shape[-1] % 16))
    return Channels(padded.to(E4M3), scale)


def slots(tokens: int) -> Tensor:
    """Which token lies in each place of v for `kernels.attention_8bit.hopper`: a permutation of each 16.

    wgmma's accumulator holds columns 8 h + 2 t + e of 16 in lane t (h, e of 0, 1), its 8-bit operand columns
    4 t + 2 h + e (PTX ISA, "Register Fragments for wgmma"): place 4 t + 2 h + e takes token 8 h + 2 t + e.
    """
    if tokens % 16:
        raise ValueError(f"{tokens} tokens: expected a multiple of 16")
    at = torch.arange(tokens)
    return at // 16 * 16 + at // 2 % 2 * 8 + at % 16 // 4 * 2 + at % 2


def attention(
    q_BLHK: Tensor,
    k_BTHK: Tensor,
    v_BTHK: Tensor,
    block_m: int = 128,
    block_n: int = 128,
    last_first: bool = False,
) -> Tensor:
    """softmax(q k^T / sqrt(K)) v in q's dtype, [B, L, H, K].

    The order of key blocks changes what P is rounded at: `last_first` is that of the Hopper kernel.
    """
    tokens = k_BTHK.shape[1]
    q = quantize_blocks(q_BLHK, None, block_m)
    k = quantize_blocks(k_BTHK, mean_over_tokens(k_BTHK), block_n)
    v = quantize_channels(v_BTHK)
    q_BHLK, v_BHKT = q.data.float(), decode(v.data)
    of_query = q.scale.repeat_interleave(block_m, 2)[:, :, : q_BHLK.shape[2], None]
    of_query = of_query * (LOG2E * q_BHLK.shape[-1] ** -0.5)
    highest = q_BHLK.new_full((*q_BHLK.shape[:3], 1), -torch.inf)
    total, out_BHLK = torch.zeros_like(highest), torch.zeros_like(q_BHLK)
    blocks = -(-tokens // block_n)
    for index in [blocks - 1, *range(blocks - 1)] if last_first else range(blocks):
        here = slice(index * block_n, min((index + 1) * block_n, tokens))
        scores = q_BHLK @ k.data[:, :, here].float().transpose(-1, -2)
        scores = scores * (of_query * k.scale[:, :, index, None, None])
        now = torch.maximum(highest, scores.amax(-1, keepdim=True))
        p, fade = torch.exp2(scores - now), torch.exp2(highest - now)
        total = total * fade + p.sum(-1, keepdim=True)
        product = decode((p * LARGEST).to(E4M3)) @ v_BHKT[..., here].transpose(-1, -2)
        out_BHLK, highest = out_BHLK * fade + product, now
    out_BHLK = out_BHLK / (total * LARGEST) * v.scale[:, :, None]
    return out_BHLK.transpose(1, 2).to(q_BLHK.dtype).contiguous()

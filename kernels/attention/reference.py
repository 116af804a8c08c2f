"""Attention as the formula reads, and with a row's maximum that stays.

Shapes: B batch, L query tokens, T key tokens, H heads, K head dimension.
"""

import math

import torch
from torch import Tensor

BIAS = 32.0  # P of the largest of the first keys is 2^-32: sums may grow by more than they may shrink
LIMIT = 1.0  # a larger sum (of a lane) gets a new maximum
LARGEST_SUM = 2.0**90  # 2^-BIAS over it is the least that fp32 has; from it on a row is NaN


def attention(q_BLHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K)) v in fp64, as fp64."""
    q, k, v = (x.transpose(1, 2).double() for x in (q_BLHK, k_BTHK, v_BTHK))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return (torch.softmax(scores, dim=-1) @ v).transpose(1, 2)


def settled(q_BLHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor, block: int = 80) -> Tensor:
    """The same in fp32 with P in bf16 as `kernels.attention.flash4_softmax` does it, block after block."""
    q, k, v = (x.transpose(1, 2).float() for x in (q_BLHK, k_BTHK, v_BTHK))
    scale = math.log2(math.e) * q.shape[-1] ** -0.5
    blocks = range((k.shape[2] - 1) // block * block, -1, -block)  # the last first
    for start in blocks:
        scores = q @ k[:, :, start : start + block].transpose(-1, -2)
        if start == blocks[0]:
            peak = scores.amax(-1, keepdim=True) + BIAS / scale
            sums, out = scores.new_zeros(*scores.shape[:-1], 4), torch.zeros_like(q)
        else:
            top = sums.amax(-1, keepdim=True)
            shift = torch.where(top > LIMIT, top.log2() + BIAS, 0.0)
            down = torch.where(top < LARGEST_SUM, torch.exp2(-shift), torch.nan)
            sums, out, peak = sums * down, out * down, peak + shift / scale
        p = torch.exp2(scores * scale - peak * scale)
        for lane in range(4):  # of four lanes each holds two columns of eight
            mine = torch.arange(p.shape[-1], device=p.device) % 8 // 2 == lane
            sums[..., lane] += p[..., mine].sum(-1)
        out = out + p.bfloat16().float() @ v[:, :, start : start + block]
    total = sums.sum(-1, keepdim=True)
    inverse = torch.where(total < LARGEST_SUM, 1 / total, torch.nan)
    return (out * inverse).transpose(1, 2).to(q_BLHK.dtype)

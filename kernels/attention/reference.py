"""Attention as the formula reads.

Shapes: B batch, L query tokens, T key tokens, H heads, K head dimension.
"""

import torch
from torch import Tensor


def attention(q_BLHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K)) v in fp64, as fp64."""
    q, k, v = (x.transpose(1, 2).double() for x in (q_BLHK, k_BTHK, v_BTHK))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return (torch.softmax(scores, dim=-1) @ v).transpose(1, 2)

"""Attention with one wide head in plain torch.

Shapes: B batch, H heads, L query tokens, T key tokens, K head dimension.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(q_BHLK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K)) v by whatever torch chooses."""
    q, k, v = (_lone_row(x) for x in (q_BHLK, k_BHTK, v_BHTK))
    return F.scaled_dot_product_attention(q, k, v)


def _lone_row(x: Tensor) -> Tensor:
    """A lone row's stride can be any number, and kernels on CUDA refuse one that is no multiple of eight."""
    return x.clone(memory_format=torch.contiguous_format) if x.shape[2] == 1 else x

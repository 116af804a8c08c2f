"""Attention with one wide head in plain torch.

Shapes: B batch, H heads, L query tokens, T key tokens, K head dimension.
"""

import torch.nn.functional as F
from torch import Tensor


def attention(q_BHLK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K)) v by whatever torch chooses."""
    return F.scaled_dot_product_attention(q_BHLK, k_BHTK, v_BHTK)

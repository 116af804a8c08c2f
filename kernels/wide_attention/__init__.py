"""Attention with heads too wide for the fast libraries' kernels, such as the VAE's one head of 384.

On CUDA the device's tuning table says, by head dimension, whether torch's choice or our form (`triton`) is
used; without an entry torch chooses.
"""

import torch
from torch import Tensor

from kernels import tables
from kernels.wide_attention import reference

__all__ = ["attention"]


def attention(q_BHLK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K)) v, [B, H, L, K] in q's dtype."""
    if q_BHLK.is_cuda and q_BHLK.dtype in (torch.bfloat16, torch.float16):
        key = f"{q_BHLK.shape[-1]}"
        choice = tables.setting("wide_attention", key, q_BHLK.device, {"backend": "library"})
        if choice["backend"] == "triton":
            from kernels.wide_attention import triton

            if triton.fits(k_BHTK):
                return triton.attention(q_BHLK, k_BHTK, v_BHTK)
    return reference.attention(q_BHLK, k_BHTK, v_BHTK)

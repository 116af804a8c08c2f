"""Attention with 8-bit operands: our Triton kernel on CUDA, its exact emulation in torch elsewhere."""

from torch import Tensor

from kernels.attention_8bit import reference

__all__ = ["attention"]


def attention(q_BLHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K)) v in q's dtype, [B, L, H, K]; every key counts (callers cut padding off)."""
    if q_BLHK.is_cuda:
        from kernels.attention_8bit import triton

        if triton.fits(q_BLHK, k_BTHK, v_BTHK):
            return triton.attention(q_BLHK, k_BTHK, v_BTHK)
    return reference.attention(q_BLHK, k_BTHK, v_BTHK)

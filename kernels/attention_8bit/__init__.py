"""Attention with 8-bit operands: on CUDA the backend of `choice`, elsewhere our kernel's exact emulation."""

from torch import Tensor

from kernels.attention_8bit import reference

__all__ = ["attention"]


def attention(q_BLHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K)) v in q's dtype, [B, L, H, K]; every key counts (callers cut padding off)."""
    if not q_BLHK.is_cuda or min(q_BLHK.numel(), k_BTHK.numel()) == 0:
        return reference.attention(q_BLHK, k_BTHK, v_BTHK)
    from kernels.attention_8bit.choice import BACKENDS, choice

    name = choice(q_BLHK.dtype, q_BLHK.shape[-1], k_BTHK.shape[1], q_BLHK.device)
    return BACKENDS[name](q_BLHK, k_BTHK, v_BTHK)

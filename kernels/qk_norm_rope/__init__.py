"""RMSNorm on q and k, 3-D RoPE, and the layout that the all-to-all sends, in one pass.

The torch reference runs on a CPU, the Triton kernel on CUDA; on the meta device only the kernel's memory
is accounted for.
"""

import torch
from torch import Tensor

from kernels.qk_norm_rope import reference
from kernels.qk_norm_rope.layout import SendLayout

__all__ = ["SendLayout", "norm_rope", "qk_norm_rope", "rms_norm"]


def rms_norm(x_BLD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """RMSNorm over the full width (all heads together) in fp32, rounded once to x's dtype."""
    if x_BLD.is_cuda:
        from kernels.qk_norm_rope import triton

        return triton.rms_norm(x_BLD, weight_D, eps)
    if x_BLD.is_meta:
        return torch.empty_like(x_BLD)
    return reference.rms_norm(x_BLD, weight_D, eps)


def norm_rope(
    x_BLD: Tensor, weight_D: Tensor, rope: tuple[Tensor, Tensor], layout: SendLayout, eps: float
) -> Tensor:
    """q or k alone: normalised over the full width and rotated, [B, L, H, K] elements in `layout`."""
    if x_BLD.is_cuda:
        from kernels.qk_norm_rope import triton

        return triton.norm_rope(x_BLD, weight_D, rope, layout, eps)
    if x_BLD.is_meta:
        return x_BLD.new_empty((*x_BLD.shape[:2], layout.heads, x_BLD.shape[2] // layout.heads))
    return reference.norm_rope(x_BLD, weight_D, rope, layout, eps)


def qk_norm_rope(
    qkv_BLD: Tensor,
    weight_q_D: Tensor,
    weight_k_D: Tensor,
    rope: tuple[Tensor, Tensor],
    layout: SendLayout,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Packed q, k, v [B, L, 3 * D] -> (q, k, v), [B, L, H, K] elements each in `layout` and qkv's dtype.

    q and k are normalised over the full width and rotated by `rope`, fp32 (cos, sin) [L, K / 2] of this
    rank's tokens. On CUDA with one rank, v is a view of the input.
    """
    if qkv_BLD.is_cuda:
        from kernels.qk_norm_rope import triton

        return triton.qk_norm_rope(qkv_BLD, weight_q_D, weight_k_D, rope, layout, eps)
    if qkv_BLD.is_meta:
        batch, length, packed = qkv_BLD.shape
        shape = (batch, length, layout.heads, packed // 3 // layout.heads)
        out = qkv_BLD.new_empty((2 if layout.ranks == 1 else 3, *shape))
        return out[0], out[1], out[-1]
    return reference.qk_norm_rope(qkv_BLD, weight_q_D, weight_k_D, rope, layout, eps)

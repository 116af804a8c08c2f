"""RMSNorm over the full width, 3-D RoPE and the all-to-all's layout in plain torch.

Shapes: B batch, L tokens here, D features, H heads, K head dimension.
All arithmetic is fp32 (fp64 for fp64 inputs); each result is rounded once.
"""

import torch
from torch import Tensor

from kernels.qk_norm_rope.layout import SendLayout


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x_BLD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """RMSNorm over the full width (all heads together), in x's dtype."""
    x = _wide(x_BLD)
    return (x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * _wide(weight_D)).to(x_BLD.dtype)


def apply_rope(x_BLHK: Tensor, cos_LK: Tensor, sin_LK: Tensor) -> Tensor:
    """Turn each interleaved pair (2i, 2i+1) of every head by its token's angle; tables are [L, K/2]."""
    even, odd = _wide(x_BLHK).reshape(*x_BLHK.shape[:-1], -1, 2).unbind(-1)
    cos, sin = cos_LK[:, None, :], sin_LK[:, None, :]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def norm_rope(
    x_BLD: Tensor, weight_D: Tensor, rope: tuple[Tensor, Tensor], layout: SendLayout, eps: float
) -> Tensor:
    """q or k alone: [B, L, H, K] elements in `layout`, normed and rotated."""
    x = _wide(x_BLD)
    x = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * _wide(weight_D)
    x_BLHK = apply_rope(torch.unflatten(x, -1, (layout.heads, -1)), *rope)
    return layout.pack(x_BLHK.to(x_BLD.dtype))


def qk_norm_rope(
    qkv_BLD: Tensor,
    weight_q_D: Tensor,
    weight_k_D: Tensor,
    rope: tuple[Tensor, Tensor],
    layout: SendLayout,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Packed q, k, v [B, L, 3 * D] -> (q, k, v), [B, L, H, K] elements each in `layout`."""
    q_BLD, k_BLD, v_BLD = qkv_BLD.chunk(3, dim=-1)
    return (
        norm_rope(q_BLD, weight_q_D, rope, layout, eps),
        norm_rope(k_BLD, weight_k_D, rope, layout, eps),
        layout.pack(torch.unflatten(v_BLD, -1, (layout.heads, -1))),
    )

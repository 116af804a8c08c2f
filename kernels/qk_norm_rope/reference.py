"""RMSNorm over the full width, 3-D RoPE and the all-to-all's layout in plain torch.

Shapes: B batch, L tokens here, D features, H heads, K head dimension, R ranks, G = H / R heads a rank.
All arithmetic is fp32 (fp64 for fp64 inputs); each result is rounded once.
"""

import torch
from torch import Tensor


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


def qk_norm_rope(
    qkv_BLD: Tensor,
    weight_q_D: Tensor,
    weight_k_D: Tensor,
    rope: tuple[Tensor, Tensor],
    heads: int,
    ranks: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Packed q, k, v [B, L, 3 * D] -> each [R, B, L, G, K] in qkv's dtype, q and k normed and rotated."""
    batch, length, packed = qkv_BLD.shape
    q, k, v = qkv_BLD.view(batch, length, 3, packed // 3).unbind(2)
    parts = []
    for x, weight in ((q, weight_q_D), (k, weight_k_D)):
        x = _wide(x)
        x = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * _wide(weight)
        parts.append(apply_rope(x.view(batch, length, heads, -1), *rope).to(qkv_BLD.dtype))
    parts.append(v)
    shape = (batch, length, ranks, heads // ranks, packed // 3 // heads)
    q, k, v = (x.reshape(shape).permute(2, 0, 1, 3, 4).contiguous() for x in parts)
    return q, k, v

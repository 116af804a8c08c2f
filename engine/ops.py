"""The block's elementwise maths in plain torch, one function a formula: the seam where kernels plug in.

Shapes: B batch, L tokens here, D features, H heads, K head dimension, S timestep sets (1, or 2 when the
first latent frame is clean). With two sets the first `split` tokens use set 0 and the others set 1.
All arithmetic is fp32 whatever the inputs' dtype.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def per_token(v_BSD: Tensor, split: int, length: int) -> Tensor:
    """The vector of each token: [B, 1, D] for one set (it broadcasts), [B, L, D] for two."""
    if v_BSD.shape[1] == 1:
        return v_BSD
    counts = v_BSD.new_tensor([split, length - split]).long()
    return v_BSD.repeat_interleave(counts, dim=1, output_size=length)


def modulated_norm(x_BLD: Tensor, shift_BSD: Tensor, scale_BSD: Tensor, split: int, eps: float) -> Tensor:
    """LN(x) * (1 + scale) + shift, without affine weights; fp32 out."""
    length = x_BLD.shape[1]
    y_BLD = F.layer_norm(x_BLD.float(), x_BLD.shape[-1:], eps=eps)
    return y_BLD * (1 + per_token(scale_BSD, split, length)) + per_token(shift_BSD, split, length)


def add_gated(x_BLD: Tensor, y_BLD: Tensor, gate_BSD: Tensor, split: int) -> Tensor:
    """x + y * gate: the fp32 residual stream takes a branch's output."""
    return x_BLD + y_BLD.float() * per_token(gate_BSD, split, x_BLD.shape[1])


def rms_norm(x_BLD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """RMSNorm over the full width D (all heads together), computed in fp32; fp32 out."""
    x = x_BLD.float()
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight_D.float()


def apply_rope(x_BLHK: Tensor, cos_LK: Tensor, sin_LK: Tensor) -> Tensor:
    """Turn each interleaved pair (2i, 2i+1) of every head by its token's angle; fp32 out."""
    even, odd = torch.unflatten(x_BLHK.float(), -1, (-1, 2)).unbind(-1)
    cos, sin = cos_LK[:, None, :], sin_LK[:, None, :]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)

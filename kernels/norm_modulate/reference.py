"""Layer norm and modulation in plain torch: the formula that the Triton kernel is tested against.

Shapes: B batch, L tokens, D features, S timestep sets (1, or 2 when the first latent frame is clean).
All arithmetic is fp32 (fp64 for fp64 inputs); each result is rounded once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.norm_modulate.norm import Norm


def per_token(v_BSD: Tensor, split: int, length: int) -> Tensor:
    """The vector of each token: [B, 1, D] for one set (it broadcasts), [B, L, D] for two."""
    if v_BSD.shape[1] == 1:
        return v_BSD
    counts = v_BSD.new_tensor([split, length - split]).long()
    return v_BSD.repeat_interleave(counts, dim=1, output_size=length)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def normalize(x_BLD: Tensor, norm: Norm, dtype: torch.dtype) -> Tensor:
    """LN(x) * (offset + scale) + shift as `dtype`, [B, L, D]."""
    length = x_BLD.shape[1]
    y_BLD = F.layer_norm(_wide(x_BLD), x_BLD.shape[-1:], eps=norm.eps)
    scale = norm.offset + per_token(norm.scale, norm.split, length)
    return (y_BLD * scale + per_token(norm.shift, norm.split, length)).to(dtype)


def add_gated(x_BLD: Tensor, y_BLD: Tensor, gate_BSD: Tensor | None, split: int) -> Tensor:
    """x + y * gate (gate 1 when None), in x's dtype; x of batch 1 broadcasts to y's batch."""
    y = _wide(y_BLD)
    if gate_BSD is not None:
        y = y * per_token(gate_BSD, split, y_BLD.shape[1])
    return (_wide(x_BLD) + y).to(x_BLD.dtype)


def add_normalize(
    x_BLD: Tensor, y_BLD: Tensor, gate_BSD: Tensor | None, norm: Norm, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The residual stream after a branch, and its normalised copy: (x + y * gate, norm of it)."""
    x_BLD = add_gated(x_BLD, y_BLD, gate_BSD, norm.split)
    return x_BLD, normalize(x_BLD, norm, dtype)

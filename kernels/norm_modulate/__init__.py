"""LayerNorm with modulation, alone or fused with the residual's update before it.

The torch reference runs on a CPU, the Triton kernel on CUDA; on the meta device only the kernel's memory
is accounted for.
"""

import torch
from torch import Tensor

from kernels.norm_modulate import reference
from kernels.norm_modulate.norm import Norm

__all__ = ["Norm", "add_normalize", "normalize"]


def normalize(x_BLD: Tensor, norm: Norm, dtype: torch.dtype) -> Tensor:
    """LN(x) * (offset + scale) + shift as `dtype`, [B, L, D], from x of any float dtype."""
    if x_BLD.is_cuda:
        from kernels.norm_modulate import triton

        return triton.normalize(x_BLD, norm, dtype)
    if x_BLD.is_meta:
        return torch.empty_like(x_BLD, dtype=dtype)
    return reference.normalize(x_BLD, norm, dtype)


def add_normalize(
    x_BLD: Tensor, y_BLD: Tensor, gate_BSD: Tensor | None, norm: Norm, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(x + y * gate in x's dtype, its norm as `dtype`): a branch joins the residual stream.

    x is [B or 1, L, D], y [B, L, D], gate [B or 1, S, D] or None for 1; both results are [B, L, D].
    """
    if x_BLD.is_cuda:
        from kernels.norm_modulate import triton

        return triton.add_normalize(x_BLD, y_BLD, gate_BSD, norm, dtype)
    if x_BLD.is_meta:
        return torch.empty_like(y_BLD, dtype=x_BLD.dtype), torch.empty_like(y_BLD, dtype=dtype)
    return reference.add_normalize(x_BLD, y_BLD, gate_BSD, norm, dtype)

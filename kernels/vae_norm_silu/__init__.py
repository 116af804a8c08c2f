"""The VAE's channel RMSNorm with SiLU, written straight into the next convolution's input.

The torch reference runs on a CPU, the Triton kernel on CUDA; on the meta device only the kernel's memory
is accounted for.
"""

import torch
from torch import Tensor

from kernels.vae_norm_silu import reference

__all__ = ["norm_silu"]


def norm_silu(x_BCTHW: Tensor, gamma_C: Tensor, silu: bool = True, out: Tensor | None = None) -> Tensor:
    """silu(x / max(|x|, 1e-12) * sqrt(C) * gamma) over channels, in x's dtype; without SiLU on request.

    `out`, if given, is [B, C, T, H, W] of x's shape with any strides but 1 for channels, e.g. the inside of
    a padded buffer; otherwise the result is channels-last on CUDA.
    """
    if x_BCTHW.is_cuda:
        from kernels.vae_norm_silu import triton

        return triton.norm_silu(x_BCTHW, gamma_C, silu, out)
    if x_BCTHW.is_meta:
        return torch.empty_like(x_BCTHW) if out is None else out
    return reference.norm_silu(x_BCTHW, gamma_C, silu, out)

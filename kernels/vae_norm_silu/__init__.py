"""The VAE's channel RMSNorm with SiLU, written straight into the next convolution's input.

The torch reference runs on a CPU, the Triton kernel on CUDA; on the meta device only the kernel's memory
is accounted for.
"""

import torch
from torch import Tensor

from kernels.tables import setting
from kernels.vae_norm_silu import reference

__all__ = ["PAST", "flat", "join", "norm_silu"]

PAST = 2  # frames that a convolution over three looks back


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


def join(
    x_BCTHW: Tensor,
    out_BCTHW: Tensor,
    *,
    past_BCTHW: Tensor | None = None,
    bias_C: Tensor | None = None,
    shortcut_BCTHW: Tensor | None = None,
    gamma_C: Tensor | None = None,
    silu: bool = True,
    keep: bool = False,
) -> Tensor:
    """The next causal convolution's input in one pass: sum, norm, SiLU, and the frames before in front.

    With s = x + bias + shortcut (fp32 sums) and y = silu(norm(s)), or y = s where `gamma_C` is None:
    `out` [B, C, T + 2, H, W] becomes `past` [B, C, 2, H, W] followed by y, and `past`, in place, its last
    two frames (for the next call). An `out` of [B, 3C, T, H, W] gets the same spread: its frame t is frames
    t, t + 1 and t + 2 side by side as channels, which is what a flat convolution wants that does the work of
    one over three frames. Without `past`, `out` has T frames. With `keep` the sum is stored too:
    returned is the tensor that holds it, x itself if it lies channels-last and else a copy. All tensors are
    of one dtype; `out` and `past` may be views with any strides but 1 for channels.
    """
    arguments = (past_BCTHW, bias_C, shortcut_BCTHW, gamma_C, silu, keep)
    if x_BCTHW.is_cuda:
        from kernels.vae_norm_silu import triton

        return triton.join(x_BCTHW, out_BCTHW, *arguments)
    if x_BCTHW.is_meta:
        return x_BCTHW
    return reference.join(x_BCTHW, out_BCTHW, *arguments)


def flat(channels: int, outputs: int, like: Tensor) -> bool:
    """Whether a convolution over three frames runs faster as a flat one over three times the channels.

    As the device's table says; where nothing is computed (the meta device), as more memory is taken.
    """
    return bool(setting("vae_flat", f"{channels} {outputs}", like.device, {"flat": like.is_meta})["flat"])

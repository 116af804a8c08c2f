"""The VAE's channel norm, SiLU and joining of frames in plain torch.

Shapes: B batch, C channels, T frames, H W rows and columns. Arithmetic is fp32 (fp64 for fp64 inputs).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _per_channel(v_C: Tensor, like: Tensor) -> Tensor:
    return v_C.to(like.dtype)[:, None, None, None]


def _normed(x: Tensor, gamma_C: Tensor, silu: bool) -> Tensor:
    y = F.normalize(x, dim=1) * x.shape[1] ** 0.5 * _per_channel(gamma_C, x)
    return F.silu(y) if silu else y


def norm_silu(x_BCTHW: Tensor, gamma_C: Tensor, silu: bool = True, out: Tensor | None = None) -> Tensor:
    """silu(x / max(|x|, 1e-12) * sqrt(C) * gamma) over channels, in x's dtype; into `out` if given.

    The formula is the official VAE's RMS_norm (Wan-Video/Wan2.2 `wan/modules/vae2_1.py`, Apache-2.0).
    """
    y = _normed(_wide(x_BCTHW), gamma_C, silu).to(x_BCTHW.dtype)
    if out is None:
        return y
    out.copy_(y)
    return out


def join(
    x_BCTHW: Tensor,
    out_BCTHW: Tensor,
    past_BCTHW: Tensor | None,
    bias_C: Tensor | None,
    shortcut_BCTHW: Tensor | None,
    gamma_C: Tensor | None,
    silu: bool,
    keep: bool,
) -> Tensor:
    """See `kernels.vae_norm_silu.join`."""
    total = _wide(x_BCTHW)
    if bias_C is not None:
        total = total + _per_channel(bias_C, total)
    if shortcut_BCTHW is not None:
        total = total + _wide(shortcut_BCTHW)
    y = (total if gamma_C is None else _normed(total, gamma_C, silu)).to(x_BCTHW.dtype)
    if past_BCTHW is not None:
        y = torch.cat((past_BCTHW, y), dim=2)
        past_BCTHW.copy_(y[:, :, -past_BCTHW.shape[2] :])
    channels, frames = x_BCTHW.shape[1:3]
    for first, part in enumerate(torch.split(out_BCTHW, channels, dim=1)):
        part.copy_(y if part.shape[2] > frames or past_BCTHW is None else y[:, :, first : first + frames])
    if keep and not (bias_C is None and shortcut_BCTHW is None):
        x_BCTHW.copy_(total)
    return x_BCTHW

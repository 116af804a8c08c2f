"""The VAE's channel norm and SiLU in plain torch.

Shapes: B batch, C channels, T H W frames, rows and columns. Arithmetic is fp32 (fp64 for fp64 inputs).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def norm_silu(x_BCTHW: Tensor, gamma_C: Tensor, silu: bool = True, out: Tensor | None = None) -> Tensor:
    """silu(x / max(|x|, 1e-12) * sqrt(C) * gamma) over channels, in x's dtype; into `out` if given.

    The formula is the official VAE's RMS_norm (Wan-Video/Wan2.2 `wan/modules/vae2_1.py`, Apache-2.0).
    """
    x = x_BCTHW if x_BCTHW.dtype == torch.float64 else x_BCTHW.float()
    gamma = gamma_C.to(x.dtype)[:, None, None, None]
    y = F.normalize(x, dim=1) * x.shape[1] ** 0.5 * gamma
    y = (F.silu(y) if silu else y).to(x_BCTHW.dtype)
    if out is None:
        return y
    out.copy_(y)
    return out

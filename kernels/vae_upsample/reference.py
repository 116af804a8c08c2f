"""Phase convolutions in plain torch.

Shapes: N pictures, C channels in, O channels out, H W rows and columns of the small map; 2 2 is a phase:
even or odd output row, even or odd output column.
"""

import torch
from torch import Tensor


def upsample_conv(x_NCHW: Tensor, weight_OC33: Tensor, bias_O: Tensor | None) -> Tensor:
    """What is to be computed: double rows and columns, then convolve with padding 1."""
    double = x_NCHW.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    return torch.nn.functional.conv2d(double, weight_OC33, bias_O, padding=1)


def fold(weight_OC33: Tensor) -> Tensor:
    """[4 * O, C, 2, 2]: the phases' weights, summed in fp32 (fp64 for fp64) and rounded once.

    An even output row 2i sees small rows i - 1, i, i by its three taps; an odd one, 2i + 1, sees i, i, i + 1.
    """
    wide = weight_OC33 if weight_OC33.dtype == torch.float64 else weight_OC33.float()
    even, odd = [[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]], [[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    taps = torch.tensor([even, odd], dtype=wide.dtype, device=wide.device)  # phase, small tap, large tap
    folded = torch.einsum("apk,bql,ockl->abocpq", taps, taps, wide)
    return folded.flatten(0, 2).to(weight_OC33.dtype)


def interleave(phases_NCHW: Tensor, bias_O: Tensor | None) -> Tensor:
    """Output row 2i + a, column 2j + b is phase (a, b) of row i + a, column j + b; sums in fp32."""
    n, c, h, w = phases_NCHW.shape
    rows, columns = h - 1, w - 1
    shape = (n, c // 4, 2 * rows, 2 * columns)
    out = torch.empty(
        shape, dtype=phases_NCHW.dtype, device=phases_NCHW.device, memory_format=torch.channels_last
    )
    for phase, part in enumerate(phases_NCHW.chunk(4, dim=1)):
        a, b = divmod(phase, 2)
        x = part[:, :, a : a + rows, b : b + columns]
        if bias_O is not None:
            wide = x if x.dtype == torch.float64 else x.float()
            x = wide + bias_O.to(wide.dtype)[:, None, None]
        out[:, :, a::2, b::2] = x
    return out

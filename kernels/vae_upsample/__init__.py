"""Nearest-neighbour doubling and a 3 x 3 convolution, folded into four phase convolutions on the small map.

Doubled rows repeat, so each output row is a sum over only two small ones, with the taps that meet the same
row added up beforehand; likewise columns. So each of the four output phases (even or odd row and column) is
a 2 x 2 convolution, and all four are one with four times the outputs: 16 instead of 36 products an output
pixel and channel pair, and the doubled map is never made. Exact up to rounding. `interleave` puts the phases
in place; the torch reference runs on a CPU, the Triton kernel on CUDA.
"""

from torch import Tensor

from kernels.vae_upsample import reference
from kernels.vae_upsample.reference import fold

__all__ = ["fold", "interleave"]


def interleave(phases_NCHW: Tensor, bias_O: Tensor | None) -> Tensor:
    """[N, O, 2H, 2W], channels last, from the phases [N, 4 * O, H + 1, W + 1], plus a bias.

    The phases are the padded 2 x 2 convolution of the small map by `fold`'s weights.
    """
    if phases_NCHW.is_cuda:
        from kernels.vae_upsample import triton

        return triton.interleave(phases_NCHW, bias_O)
    if phases_NCHW.is_meta:
        n, c, h, w = phases_NCHW.shape
        return phases_NCHW.new_empty((n, c // 4, 2 * h - 2, 2 * w - 2))
    return reference.interleave(phases_NCHW, bias_O)

# Triton kernels carry no annotations; the launchers below them do.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""Puts the four phases of a doubled map in their places and adds the bias, in Triton.

One program takes ROWS output pixels with all their channels, neighbours along a row. Memory-bound: 4 bytes
a value in fp16.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.tables import setting

DEFAULT = {"block": 4096, "warps": 4}


@triton.jit(do_not_specialize=["pixels", "height", "width"])
def _interleave_kernel(
    x_ptr,
    bias_ptr,
    out_ptr,
    pixels,
    height,
    width,
    xn,
    xh,
    xw,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
    BIAS: tl.constexpr,
):
    pixel = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK_C)
    inside = channel < C
    valid = (pixel < pixels)[:, None] & inside[None, :]
    column = pixel % width
    row = pixel // width % height
    n = pixel // (width * height)
    a = row % 2
    b = column % 2
    start = n * xn + (row // 2 + a) * xh + (column // 2 + b) * xw + (2 * a + b) * C
    x = tl.load(x_ptr + start[:, None] + channel[None, :], mask=valid, other=0.0)
    if BIAS:
        bias = tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)
        x = x.to(tl.float32) + bias[None, :]
    out_at = (pixel * C)[:, None] + channel[None, :]
    tl.store(out_ptr + out_at, x.to(out_ptr.dtype.element_ty), mask=valid)


def interleave(phases_NCHW: Tensor, bias_O: Tensor | None) -> Tensor:
    """[N, O, 2H, 2W] channels last; see `kernels.vae_upsample.interleave`."""
    n, c, h, w = phases_NCHW.shape
    if c % 4 or h < 2 or w < 2:
        raise ValueError(f"{tuple(phases_NCHW.shape)} are no four phases of a map, one larger each way")
    if phases_NCHW.stride(1) != 1:
        phases_NCHW = phases_NCHW.contiguous(memory_format=torch.channels_last)
    channels, height, width = c // 4, 2 * h - 2, 2 * w - 2
    out = torch.empty(
        (n, channels, height, width),
        dtype=phases_NCHW.dtype,
        device=phases_NCHW.device,
        memory_format=torch.channels_last,
    )
    pixels = n * height * width
    if pixels == 0:
        return out
    block_c = triton.next_power_of_2(channels)
    tuned = setting("vae_upsample", f"{channels}", out.device, DEFAULT)
    rows = max(tuned["block"] // block_c, 1)
    _interleave_kernel[(triton.cdiv(pixels, rows),)](
        phases_NCHW,
        phases_NCHW if bias_O is None else bias_O.contiguous(),
        out,
        pixels,
        height,
        width,
        phases_NCHW.stride(0),
        phases_NCHW.stride(2),
        phases_NCHW.stride(3),
        C=channels,
        BLOCK_C=block_c,
        ROWS=rows,
        BIAS=bias_O is not None,
        num_warps=tuned["warps"],
    )
    return out

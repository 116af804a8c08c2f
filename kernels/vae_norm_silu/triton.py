# Triton kernels carry no annotations; the launchers below them do.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""The VAE's channel norm and SiLU in one pass over channels-last memory, in Triton.

One program takes ROWS pixels with all their channels. The output may be a view into a larger buffer, such
as a causal convolution's input with its cached frames and padding around it, so that no copy follows.
Memory-bound: 4 bytes a value in fp16.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.tables import setting

DEFAULT = {"block": 4096, "warps": 4}


@triton.jit(do_not_specialize=["pixels", "frames", "height", "width"])
def _norm_silu_kernel(
    x_ptr,
    gamma_ptr,
    out_ptr,
    pixels,
    frames,
    height,
    width,
    xb,
    xt,
    xh,
    xw,
    ob,
    ot,
    oh,
    ow,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
    SILU: tl.constexpr,
):
    pixel = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK_C)
    valid = (pixel < pixels)[:, None] & (channel < C)[None, :]
    w = pixel % width
    h = pixel // width % height
    t = pixel // (width * height) % frames
    b = pixel // (width * height * frames)
    x_at = (b * xb + t * xt + h * xh + w * xw)[:, None] + channel[None, :]
    out_at = (b * ob + t * ot + h * oh + w * ow)[:, None] + channel[None, :]

    x = tl.load(x_ptr + x_at, mask=valid, other=0.0).to(tl.float32)
    gamma = tl.load(gamma_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)
    length = tl.maximum(tl.sqrt(tl.sum(x * x, axis=1)), 1e-12)
    y = x * (tl.sqrt(C + 0.0) / length)[:, None] * gamma[None, :]
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    tl.store(out_ptr + out_at, y.to(out_ptr.dtype.element_ty), mask=valid)


def norm_silu(x_BCTHW: Tensor, gamma_C: Tensor, silu: bool = True, out: Tensor | None = None) -> Tensor:
    """silu(x / |x| * sqrt(C) * gamma), channels last, into `out` if given."""
    if x_BCTHW.stride(1) != 1:
        x_BCTHW = x_BCTHW.contiguous(memory_format=torch.channels_last_3d)
    if out is None:
        out = torch.empty_like(x_BCTHW, memory_format=torch.channels_last_3d)
    batch, channels, frames, height, width = x_BCTHW.shape
    if out.shape != x_BCTHW.shape or (channels > 1 and out.stride(1) != 1):
        raise ValueError(
            f"out {tuple(out.shape)} with strides {out.stride()}: "
            f"expected {tuple(x_BCTHW.shape)}, channels last"
        )
    pixels = batch * frames * height * width
    if pixels == 0:
        return out
    block_c = triton.next_power_of_2(channels)
    tuned = setting("vae_norm_silu", f"{channels}", x_BCTHW.device, DEFAULT)
    rows = max(tuned["block"] // block_c, 1)
    x_strides = (x_BCTHW.stride(0), *x_BCTHW.stride()[2:])
    out_strides = (out.stride(0), *out.stride()[2:])
    _norm_silu_kernel[(triton.cdiv(pixels, rows),)](
        x_BCTHW,
        gamma_C.contiguous(),
        out,
        pixels,
        frames,
        height,
        width,
        *x_strides,
        *out_strides,
        C=channels,
        BLOCK_C=block_c,
        ROWS=rows,
        SILU=silu,
        num_warps=tuned["warps"],
    )
    return out

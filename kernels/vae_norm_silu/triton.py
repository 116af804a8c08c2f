# Triton kernels carry no annotations; the launchers below them do.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""The VAE's sums, channel norm, SiLU and cached frames in one pass over channels-last memory, in Triton.

One program takes ROWS pixels with all their channels through all frames, so that a pixel's cached frames
are read before anyone replaces them. The output may be a view into a larger buffer. Memory-bound: with
sum and cache a frame's value is read twice and written twice (8 bytes in fp16), the two cached ones are
read once and written twice.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.tables import setting

DEFAULT = {"block": 2048, "warps": 4}


@triton.jit
def _put(out_ptr, at, frame, frames, ot, y, valid, C: tl.constexpr, SPREAD: tl.constexpr):
    """Store joined frame `frame`: at its place, or spread to the three that look at it."""
    ot = tl.cast(ot, tl.int64)  # three frames side by side pass 2^31 values from some 2560x1440 on
    out_ptr += frame * ot
    if SPREAD:
        for slot in tl.static_range(3):
            if (frame >= slot) & (frame < frames + slot):
                tl.store(out_ptr + at, y, mask=valid)
            out_ptr += C - ot
    else:
        tl.store(out_ptr + at, y, mask=valid)


@triton.jit(do_not_specialize=["pixels", "frames", "height", "width"])
def _join_kernel(
    x_ptr,
    shortcut_ptr,
    bias_ptr,
    gamma_ptr,
    past_ptr,
    out_ptr,
    pixels,
    frames,
    height,
    width,
    xb,
    xt,
    xh,
    xw,
    sb,
    st,
    sh,
    sw,
    pb,
    pt,
    ph,
    pw,
    ob,
    ot,
    oh,
    ow,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
    BIAS: tl.constexpr,
    SHORTCUT: tl.constexpr,
    KEEP: tl.constexpr,
    NORM: tl.constexpr,
    SILU: tl.constexpr,
    PAST: tl.constexpr,
    SPREAD: tl.constexpr,
):
    pixel = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK_C)
    inside = channel < C
    valid = (pixel < pixels)[:, None] & inside[None, :]
    w = pixel % width
    h = pixel // width % height
    b = pixel // (width * height)
    x_at = (b * xb + h * xh + w * xw)[:, None] + channel[None, :]
    out_at = (b * ob + h * oh + w * ow)[:, None] + channel[None, :]
    shortcut_at = (b * sb + h * sh + w * sw)[:, None] + channel[None, :]
    past_at = (b * pb + h * ph + w * pw)[:, None] + channel[None, :]
    if PAST:
        oldest = tl.load(past_ptr + past_at, mask=valid, other=0.0)
        newest = tl.load(past_ptr + past_at + pt, mask=valid, other=0.0)
        _put(out_ptr, out_at, 0, frames, ot, oldest, valid, C, SPREAD)
        _put(out_ptr, out_at, 1, frames, ot, newest, valid, C, SPREAD)
        # Warps may share out loads and stores differently: nobody stores before all have loaded.
        tl.debug_barrier()
        if frames == 1:
            tl.store(past_ptr + past_at, newest, mask=valid)
        past_ptr += (2 - frames) * pt  # frame t goes to place t - frames + 2
    if BIAS:
        bias = tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        gamma = tl.load(gamma_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    for t in range(frames):
        x = tl.load(x_ptr + x_at, mask=valid, other=0.0).to(tl.float32)
        if BIAS:
            x += bias[None, :]
        if SHORTCUT:
            x += tl.load(shortcut_ptr + shortcut_at, mask=valid, other=0.0).to(tl.float32)
        if KEEP:
            tl.store(x_ptr + x_at, x.to(x_ptr.dtype.element_ty), mask=valid)
        if NORM:
            length = tl.maximum(tl.sqrt(tl.sum(x * x, axis=1)), 1e-12)
            x = x * (tl.sqrt(C + 0.0) / length)[:, None] * gamma[None, :]
            if SILU:
                x = x / (1.0 + tl.exp(-x))
        y = x.to(out_ptr.dtype.element_ty)
        _put(out_ptr, out_at, t + 2 if PAST else t, frames, ot, y, valid, C, SPREAD)
        if PAST:
            if t >= frames - 2:
                tl.store(past_ptr + past_at, y, mask=valid)
            past_ptr += pt
        x_ptr += xt
        shortcut_ptr += st


def _strides(x_BCTHW: Tensor) -> tuple[int, int, int, int]:
    """Of batch, frames, rows and columns."""
    return x_BCTHW.stride(0), x_BCTHW.stride(2), x_BCTHW.stride(3), x_BCTHW.stride(4)


def _check(x_BCTHW: Tensor, shape: tuple[int, ...], dtype: torch.dtype, what: str) -> None:
    channels_last = x_BCTHW.shape[1] == 1 or x_BCTHW.stride(1) == 1
    if tuple(x_BCTHW.shape) != shape or not channels_last or x_BCTHW.dtype != dtype:
        raise ValueError(
            f"{what} {tuple(x_BCTHW.shape)} {x_BCTHW.dtype} with strides {x_BCTHW.stride()}: "
            f"expected {shape} {dtype}, channels last"
        )


def _channels_last(x_BCTHW: Tensor) -> Tensor:
    if x_BCTHW.shape[1] == 1 or x_BCTHW.stride(1) == 1:
        return x_BCTHW
    return x_BCTHW.contiguous(memory_format=torch.channels_last_3d)


def norm_silu(x_BCTHW: Tensor, gamma_C: Tensor, silu: bool = True, out: Tensor | None = None) -> Tensor:
    """silu(x / |x| * sqrt(C) * gamma), channels last, into `out` if given."""
    x_BCTHW = _channels_last(x_BCTHW)
    if out is None:
        out = torch.empty_like(x_BCTHW, memory_format=torch.channels_last_3d)
    join(x_BCTHW, out, None, None, None, gamma_C, silu, False)
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
    x = _channels_last(x_BCTHW)
    batch, channels, frames, height, width = x.shape
    past = x if past_BCTHW is None else past_BCTHW
    shortcut = x if shortcut_BCTHW is None else _channels_last(shortcut_BCTHW)
    spread = past_BCTHW is not None and out_BCTHW.shape[1] == 3 * channels
    joined = frames if past_BCTHW is None or spread else frames + 2
    _check(out_BCTHW, (batch, (1 + 2 * spread) * channels, joined, height, width), x.dtype, "out")
    _check(shortcut, tuple(x.shape), x.dtype, "shortcut")
    if past_BCTHW is not None:
        _check(past, (batch, channels, 2, height, width), x.dtype, "past")
    pixels = batch * height * width
    if pixels == 0 or frames == 0:
        return x
    block_c = triton.next_power_of_2(channels)
    tuned = setting("vae_norm_silu", f"{channels}", x.device, DEFAULT)
    rows = max(tuned["block"] // block_c, 1)
    _join_kernel[(triton.cdiv(pixels, rows),)](
        x,
        shortcut,
        x if bias_C is None else bias_C.contiguous(),
        x if gamma_C is None else gamma_C.contiguous(),
        past,
        out_BCTHW,
        pixels,
        frames,
        height,
        width,
        *_strides(x),
        *_strides(shortcut),
        *_strides(past),
        *_strides(out_BCTHW),
        C=channels,
        BLOCK_C=block_c,
        ROWS=rows,
        BIAS=bias_C is not None,
        SHORTCUT=shortcut_BCTHW is not None,
        KEEP=keep and not (bias_C is None and shortcut_BCTHW is None),
        NORM=gamma_C is not None,
        SILU=silu,
        PAST=past_BCTHW is not None,
        SPREAD=spread,
        num_warps=tuned["warps"],
    )
    return x

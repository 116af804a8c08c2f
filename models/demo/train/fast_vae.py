"""The VAE's layers for training on a GPU: the same maths, some times faster for so narrow a model.

cuDNN's 3-D convolutions are slow at 16 channels, so a causal convolution becomes a 2-D one over each
frame with its two past frames as further channels; norm and SiLU are one Triton kernel each way; and a
whole video goes through at once instead of chunk by chunk, with frame 0 treated as the engine treats it.

Shapes: B clips, C channels, T frames, H rows, W columns, R rows of C features.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn

from engine.vae_blocks import (
    CausalConv3d,
    ChannelNorm,
    Downsample,
    ResidualBlock,
    Stream,
    Upsample,
    per_frame,
)


@triton.jit
def _norm_forward(x_ptr, gamma_ptr, y_ptr, rows, C: tl.constexpr, BLOCK: tl.constexpr, SILU: tl.constexpr):  # type: ignore
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, C)
    at = row[:, None] * C + column[None, :]
    inside = (row < rows)[:, None]
    x = tl.load(x_ptr + at, mask=inside, other=1.0).to(tl.float32)
    gamma = tl.load(gamma_ptr + column)
    length = tl.maximum(tl.sqrt(tl.sum(x * x, axis=1)), 1e-12)
    y = x / length[:, None] * (gamma * C**0.5)[None, :]
    if SILU:
        y = y * tl.sigmoid(y)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _norm_backward(  # type: ignore
    x_ptr, gamma_ptr, dy_ptr, dx_ptr, part_ptr, rows, C: tl.constexpr, BLOCK: tl.constexpr, SILU: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, C)
    at = row[:, None] * C + column[None, :]
    inside = (row < rows)[:, None]
    x = tl.load(x_ptr + at, mask=inside, other=1.0).to(tl.float32)
    dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
    gamma = tl.load(gamma_ptr + column)
    length = tl.maximum(tl.sqrt(tl.sum(x * x, axis=1)), 1e-12)
    unit = x / length[:, None]
    if SILU:
        y = unit * (gamma * C**0.5)[None, :]
        s = tl.sigmoid(y)
        dy = dy * s * (1 + y * (1 - s))
    g = dy * (gamma * C**0.5)[None, :]
    dx = (g - unit * tl.sum(g * unit, axis=1)[:, None]) / length[:, None]
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(part_ptr + tl.program_id(0) * C + column, tl.sum(dy * unit, axis=0) * C**0.5)


class NormSiLU(torch.autograd.Function):
    """x / |x| * sqrt(C) * gamma over rows [R, C], then SiLU if asked. C is a power of two."""

    @staticmethod
    def forward(ctx: Any, x_RC: Tensor, gamma_C: Tensor, silu: bool) -> Tensor:
        """[R, C] in x's dtype."""
        rows, channels = x_RC.shape
        y_RC = torch.empty_like(x_RC)
        block = 4096 // channels
        _norm_forward[(triton.cdiv(rows, block),)](x_RC, gamma_C, y_RC, rows, channels, block, silu)
        ctx.save_for_backward(x_RC, gamma_C)
        ctx.silu = silu
        return y_RC

    @staticmethod
    def backward(ctx: Any, dy_RC: Tensor) -> tuple[Tensor, Tensor, None]:
        """Gradients of x and gamma."""
        x_RC, gamma_C = ctx.saved_tensors
        rows, channels = x_RC.shape
        block = 4096 // channels
        blocks = triton.cdiv(rows, block)
        dx_RC = torch.empty_like(x_RC)
        parts = torch.empty(blocks, channels, device=x_RC.device)
        _norm_backward[(blocks,)](
            x_RC, gamma_C, dy_RC.contiguous(), dx_RC, parts, rows, channels, block, ctx.silu
        )
        return dx_RC, parts.sum(0), None


_plain_norm = ChannelNorm.forward


def channel_norm(self: ChannelNorm, x: Tensor, silu: bool = False) -> Tensor:
    """ChannelNorm.forward (and SiLU) on a GPU with the channels moved innermost, where they lie already."""
    if not x.is_cuda:
        return F.silu(_plain_norm(self, x)) if silu else _plain_norm(self, x)
    moved = x.movedim(1, -1)
    y: Tensor = NormSiLU.apply(moved.reshape(-1, x.shape[1]).contiguous(), self.gamma.flatten(), silu)
    return y.view(moved.shape).movedim(-1, 1)


def innermost(x_BCTHW: Tensor) -> Tensor:
    """[B, T, H, W, C], contiguous."""
    return x_BCTHW.movedim(1, -1).contiguous()


def causal_conv(self: CausalConv3d, x_BCTHW: Tensor, stream: Stream | None = None) -> Tensor:
    """CausalConv3d.stream of a whole video as one 2-D convolution over frames."""
    taps = self.kernel_size[0]
    x_BTHWC = innermost(x_BCTHW)
    frames = x_BTHWC.shape[1]
    if taps > 1:
        padded = F.pad(x_BTHWC, (0, 0, 0, 0, 0, 0, taps - 1, 0))
        x_BTHWC = torch.cat([padded[:, tap : tap + frames] for tap in range(taps)], dim=-1)
    weight = self.weight.movedim(2, 1).flatten(1, 2)  # [out, taps * C, rows, columns]
    if self.kernel_size[1:] == (1, 1):
        return F.linear(x_BTHWC, weight[:, :, 0, 0], self.bias).movedim(-1, 1)
    # Tensor cores want channels by eights: 3 (colours) times 3 taps in, and 3 out, are filled up.
    spare_in, spare_out = -weight.shape[1] % 8, -weight.shape[0] % 8
    pictures = F.pad(x_BTHWC, (0, spare_in)).flatten(0, 1) if spare_in else x_BTHWC.flatten(0, 1)
    bias = self.bias
    if spare_in or spare_out:
        weight = F.pad(weight, (0, 0, 0, 0, 0, spare_in, 0, spare_out))
        bias = None if bias is None else F.pad(bias, (0, spare_out))
    weight = weight.contiguous(memory_format=torch.channels_last)
    y = F.conv2d(pictures.movedim(-1, 1), weight, bias, padding=self.padding[1:])
    y_BTHWC = y.movedim(1, -1).unflatten(0, (-1, frames))
    return y_BTHWC[..., : self.out_channels].movedim(-1, 1)


def residual_block(self: ResidualBlock, x_BCTHW: Tensor, stream: Stream) -> Tensor:
    """ResidualBlock.stream with norm and SiLU in one kernel."""
    y = x_BCTHW
    for norm, conv in (("0", "2"), ("3", "6")):
        layer, convolution = self.residual[norm], self.residual[conv]
        assert isinstance(layer, ChannelNorm)
        assert isinstance(convolution, CausalConv3d)
        y = causal_conv(convolution, channel_norm(layer, y, silu=True))
    if isinstance(self.shortcut, CausalConv3d):
        return y + causal_conv(self.shortcut, x_BCTHW)
    return y + x_BCTHW


def downsample(self: Downsample, x_BCTHW: Tensor, stream: Stream) -> Tensor:
    """Downsample.stream of a whole video: frame 0 keeps its own, pairs after it become one."""
    x = per_frame(self.resample, x_BCTHW)
    if self.time_conv is None:
        return x
    x_BTHWC = innermost(x)
    taps = torch.cat((x_BTHWC[:, 0:-2:2], x_BTHWC[:, 1:-1:2], x_BTHWC[:, 2::2]), dim=-1)
    weight = self.time_conv.weight.movedim(2, 1).flatten(1)  # [out, 3 * C]
    later = F.linear(taps, weight, self.time_conv.bias)
    return torch.cat((x_BTHWC[:, :1].to(later.dtype), later), dim=1).movedim(-1, 1)


def upsample(self: Upsample, x_BCTHW: Tensor, stream: Stream) -> Tensor:
    """Upsample.stream of a whole video: frame 0 stays one frame, each later one becomes two."""
    if self.time_conv is not None:
        x_BTHWC = innermost(x_BCTHW)
        pairs = innermost(causal_conv(self.time_conv, x_BTHWC[:, 1:].movedim(-1, 1)))
        later = pairs.unflatten(-1, (2, -1)).permute(0, 1, 4, 2, 3, 5).flatten(1, 2)
        x_BCTHW = torch.cat((x_BTHWC[:, :1].to(later.dtype), later), dim=1).movedim(-1, 1)
    return per_frame(self.resample, x_BCTHW)


PATCHES: tuple[tuple[type[nn.Module], str, Any], ...] = (
    (ChannelNorm, "forward", channel_norm),
    (CausalConv3d, "stream", causal_conv),
    (ResidualBlock, "stream", residual_block),
    (Downsample, "stream", downsample),
    (Upsample, "stream", upsample),
)
_originals = [getattr(owner, name) for owner, name, _ in PATCHES]


def speed_up(on: bool = True) -> None:
    """Use these in place of the engine's own layers, in this process; or the engine's own again."""
    for (owner, name, fast), original in zip(PATCHES, _originals, strict=True):
        setattr(owner, name, fast if on else original)


def is_on() -> bool:
    """Whether `speed_up` was called: then whole videos go through at once."""
    return ResidualBlock.stream is residual_block

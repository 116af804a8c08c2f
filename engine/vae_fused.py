"""The VAE's decoder on fused kernels: the formulas of `engine.vae_blocks`, fewer passes over memory.

What is fused: every map lies channels-last; a convolution's bias and the shortcut beside it are added where
its result is read next (so they stay pending until then), in one pass with norm, SiLU and the cached frames
that the next convolution wants in front; the caches are written in place. Doubling and its convolution are
four phase convolutions (`kernels.vae_upsample`), whose weights are folded once a video, when all others are
laid out channels-last.

Shapes: B batch, C channels, T frames, H rows, W columns.
"""

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.vae_blocks import (
    AttentionBlock,
    CausalConv3d,
    ChannelNorm,
    Convolution,
    ResidualBlock,
    Space,
    Stream,
    Upsample,
    WholeFrame,
)
from engine.vae_stages import UpStage, duplicate_up
from kernels import vae_norm_silu, vae_upsample, wide_attention

if TYPE_CHECKING:
    from engine.vae import Decoder

log = logging.getLogger(__name__)

LAST = torch.channels_last_3d
HALF = (torch.bfloat16, torch.float16)


def applies(weight: Tensor) -> bool:
    """Whether a decoder with such weights runs fused: half precision on CUDA, and no gradients wanted.

    So do those without memory (the meta device), by which `engine.memory` plans a GPU's.
    """
    return (weight.is_cuda or weight.is_meta) and weight.dtype in HALF and not torch.is_grad_enabled()


@dataclass
class Sum:
    """x + bias + shortcut, not added up yet. x is nobody else's where there is something to add."""

    x: Tensor
    bias: Tensor | None = None
    shortcut: Tensor | None = None

    def keep(self, total_BCTHW: Tensor) -> Tensor:
        """The sum was made: this is it from now on."""
        self.x, self.bias, self.shortcut = total_BCTHW, None, None
        return total_BCTHW

    def total(self) -> Tensor:
        """Add up."""
        x = self.x
        if self.bias is None and self.shortcut is None:
            return x
        out = torch.empty_like(x, memory_format=LAST)
        vae_norm_silu.join(x, out, bias_C=self.bias, shortcut_BCTHW=self.shortcut)
        return self.keep(out)


class FusedDecoder:
    """A decoder's layers and what they remember of one video."""

    def __init__(self, decoder: "Decoder", space: Space | None = None) -> None:
        self.decoder, self.stream = decoder, Stream(space)
        self.space = self.stream.space
        self._bare: dict[nn.Module, Convolution] = {}  # without bias, channels-last

    def restart(self) -> None:
        """Another video begins; what is remembered is as it was at first, in its place."""
        self.stream.first = True
        for past_BCTHW in self.stream.past.values():
            past_BCTHW.zero_()

    def frames(self, z_BC1HW: Tensor) -> Tensor:
        """The next latent frame as 1 (the first) or 4 frames."""
        decoder, head = self.decoder, self.decoder.head["2"]
        value = Sum(self._causal(decoder.conv1, Sum(z_BC1HW)), decoder.conv1.bias)
        value = self._run((*decoder.middle, *decoder.upsamples), value)
        y = self._causal(head, value, decoder.head["0"])
        assert isinstance(head, CausalConv3d)
        assert head.bias is not None
        self.stream.first = False
        return y[:, : head.out_channels] + head.bias[:, None, None, None]

    def _run(self, layers: tuple[nn.Module, ...], value: Sum) -> Sum:
        for layer in layers:
            if isinstance(layer, ResidualBlock):
                value = self._residual(layer, value)
            elif isinstance(layer, AttentionBlock):
                value = Sum(layer.stream(value.total(), self.stream, wide_attention.attention))
            elif isinstance(layer, Upsample):
                value = self._upsample(layer, value)
            else:
                assert isinstance(layer, UpStage)
                value = self._stage(layer, value)
        return value

    def _residual(self, block: ResidualBlock, value: Sum) -> Sum:
        first, second = block.residual["2"], block.residual["6"]
        assert isinstance(first, CausalConv3d)
        assert isinstance(second, CausalConv3d)
        y = self._causal(first, value, block.residual["0"], keep=True)
        x = value.x  # the sum, made in the same pass
        y = self._causal(second, Sum(y, first.bias), block.residual["3"])
        if isinstance(block.shortcut, CausalConv3d):
            x = pointwise(block.shortcut, x)
        return Sum(y, second.bias, x)

    def _stage(self, stage: UpStage, value: Sum) -> Sum:
        x = value.total()
        value = self._run(tuple(stage.upsamples), Sum(x))
        if not stage.last:
            assert value.shortcut is None  # an upsample ends such a stage
            value.shortcut = duplicate_up(x, stage.out_dim, stage.t, 2, self.stream.first)
        return value

    def _upsample(self, layer: Upsample, value: Sum) -> Sum:
        if layer.time_conv is not None and not self.stream.first:
            pairs = self._causal(layer.time_conv, value)
            assert layer.time_conv.bias is not None
            x = twice_the_frames(pairs, layer.time_conv.bias)
        else:
            x = value.total()
        b, _, t, _, _ = x.shape
        conv = layer.resample[1]
        assert isinstance(conv, nn.Conv2d)
        phases = self.space.convolve(self._folded(conv), x.transpose(1, 2).flatten(0, 1))
        y = vae_upsample.interleave(phases, conv.bias)
        return Sum(torch.unflatten(y, 0, (b, t)).transpose(1, 2))

    def _causal(
        self, layer: nn.Module, value: Sum, norm: nn.Module | None = None, keep: bool = False
    ) -> Tensor:
        """The convolution (without its bias) of the value's norm and SiLU, or of the value itself.

        With `keep` the value is added up on the way.
        """
        assert isinstance(layer, CausalConv3d)
        gamma = norm.gamma.flatten() if isinstance(norm, ChannelNorm) else None
        halo, space = layer.kernel_size[2] // 2, self.space
        b, c, t, h, w = value.x.shape
        past = self.stream.past.get(layer)
        if past is None:
            past = self._empty(space.around([b, c, vae_norm_silu.PAST, h, w], halo), value.x).zero_()
            self.stream.past[layer] = past
        # Not in stripes: what cuDNN chose there for flat ones brought them to 59 dB of the whole frame's.
        whole = isinstance(space, WholeFrame) and layer.kernel_size == (3, 3, 3)
        flat = whole and vae_norm_silu.flat(c, layer.out_channels, value.x)
        channels, frames = (3 * c, t) if flat else (c, t + vae_norm_silu.PAST)
        joined = self._empty(space.around([b, channels, frames, h, w], halo), value.x)
        total = vae_norm_silu.join(
            value.x,
            space.inside(joined, halo),
            past_BCTHW=space.inside(past, halo),
            bias_C=value.bias,
            shortcut_BCTHW=value.shortcut,
            gamma_C=gamma,
            keep=keep,
        )
        if keep:
            value.keep(total)
        space.fill_halo(joined, past, halo)
        if not flat:
            return space.convolve(self._unbiased(layer), joined, with_halo=True)
        y = space.convolve(self._flat(layer), joined.transpose(1, 2).flatten(0, 1), with_halo=True)
        return torch.unflatten(y, 0, (b, t)).transpose(1, 2)

    @staticmethod
    def _empty(shape: list[int], like: Tensor) -> Tensor:
        return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=LAST)

    def _unbiased(self, layer: CausalConv3d) -> Convolution:
        """The layer for the fast path; outputs are filled up to eights, which tensor cores want."""
        if layer not in self._bare:
            missing = -layer.out_channels % 8
            weight = F.pad(layer.weight, (0,) * 9 + (missing,)) if missing else layer.weight
            assert not isinstance(layer.padding, str)
            self._bare[layer] = bare(weight, layer.padding)
        return self._bare[layer]

    def _flat(self, layer: CausalConv3d) -> Convolution:
        """The layer over three frames side by side as channels."""
        if layer not in self._bare:
            self._bare[layer] = bare(layer.weight.transpose(1, 2).flatten(1, 2), (1, 1))
        return self._bare[layer]

    def _folded(self, layer: nn.Conv2d) -> Convolution:
        """Doubling and the layer as phases."""
        if layer not in self._bare:
            self._bare[layer] = bare(vae_upsample.fold(layer.weight), (1, 1))
        return self._bare[layer]


def bare(weight: Tensor, padding: tuple[int, ...]) -> Convolution:
    """A convolution without bias, its weight channels-last."""
    flat = weight.ndim == 4
    kind = nn.Conv2d if flat else nn.Conv3d
    outputs, inputs, *kernel = weight.shape
    layer = kind(inputs, outputs, tuple(kernel), padding=padding, bias=False, device="meta")  # type: ignore
    weight = weight.contiguous(memory_format=torch.channels_last if flat else LAST)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def pointwise(layer: CausalConv3d, x_BCTHW: Tensor) -> Tensor:
    """A convolution over single pixels as a matrix product."""
    y = F.linear(x_BCTHW.movedim(1, -1), layer.weight.flatten(1), layer.bias)
    return y.movedim(-1, 1)


def twice_the_frames(pairs_BCTHW: Tensor, bias_C: Tensor) -> Tensor:
    """[B, C / 2, 2T, H, W]: the first half of the channels is the earlier frame of a pair; plus the bias."""
    b, c, t, h, w = pairs_BCTHW.shape
    pairs = torch.unflatten(pairs_BCTHW.movedim(1, -1), -1, (2, c // 2)).permute(0, 1, 4, 2, 3, 5)
    out = torch.empty((b, t, 2, h, w, c // 2), dtype=pairs.dtype, device=pairs.device)
    torch.add(pairs, bias_C.view(2, 1, 1, c // 2), out=out)
    return out.flatten(1, 2).movedim(-1, 1)

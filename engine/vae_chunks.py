"""A video's chunks by the fused decoder, in fp16's narrow range.

Each norm undoes any factor of its input, so a decoder whose residual stream is a power of two smaller
computes the same: where a chunk comes out with infinities or NaN, it is decoded again so (`scaled_down`), and
the rest of the video with it. By much more than 2^-6 weights and ordinary pixels would be denormals, so what
is still beyond fp16 then is decoded in bfloat16, which is coarser and has the range.

Shapes: B batch, C channels, T frames, F latent frames, H rows, W columns.
"""

import copy
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from engine.vae_blocks import AttentionBlock, ResidualBlock, Space, Upsample
from engine.vae_fused import LAST, FusedDecoder
from engine.vae_graph import Recordings

if TYPE_CHECKING:
    from engine.vae import Decoder

log = logging.getLogger(__name__)

SMALLER = 2.0**-6  # how much the residual stream shrinks at the second try
TRIES = 3


def scaled_down(decoder: "Decoder", factor: float) -> "Decoder":
    """A copy whose residual stream is `factor` (a power of two) times as large and whose video is the same.

    Convolutions of normed maps take the factor in weight and bias; those of the stream itself pass it on,
    so only their biases take it; the last norm undoes it.
    """
    scaled = copy.deepcopy(decoder)
    normed: list[nn.Module] = [scaled.conv1]
    linear: list[nn.Module | None] = []
    for module in scaled.modules():
        if isinstance(module, ResidualBlock):
            normed += [module.residual["2"], module.residual["6"]]
            linear.append(module.shortcut)
        elif isinstance(module, AttentionBlock):
            normed.append(module.proj)
        elif isinstance(module, Upsample):
            linear += [module.resample[1], module.time_conv]
    for layer in (*normed, *linear):
        if isinstance(layer, nn.Conv2d | nn.Conv3d) and layer.bias is not None:
            layer.bias.data.mul_(factor)
    for layer in normed:
        assert isinstance(layer, nn.Conv2d | nn.Conv3d)
        layer.weight.data.mul_(factor)
    return scaled


class Chunks(Protocol):
    """A decoder that is given one latent frame after another."""

    space: Space

    def frames(self, z_BC1HW: Tensor) -> Tensor:
        """The next latent frame as 1 (the first) or 4 frames."""
        ...


def decode(
    decoder: "Decoder",
    z_BCFHW: Tensor,
    space: Space | None = None,
    recordings: Recordings | None = None,
) -> Iterator[Tensor]:
    """Chunks of frames [B, C, 1 or 4, H, W] of latents (unnormalised, after `conv2`), as they come.

    recordings: where chunks are to be replayed as CUDA graphs, the ones that were made so far.
    """
    done, dtype = 0, z_BCFHW.dtype
    for attempt in range(TRIES):
        fused = FusedDecoder(_attempt(decoder, attempt), space)
        chunks: Chunks = fused if recordings is None or attempt else recordings.of(fused, z_BCFHW)
        last = attempt == TRIES - 1
        for frames in checked(chunks, z_BCFHW.bfloat16() if last else z_BCFHW, skip=done, last=last):
            if frames is None:
                how = "in bfloat16" if attempt else f"with a residual stream {SMALLER:g} times as large"
                log.warning("latent frame %d of %d left fp16's range in the VAE: decoded again %s",
                            done + 1, z_BCFHW.shape[2], how)  # fmt: skip
                break
            yield frames.to(dtype)
            done += 1
        else:
            return


def _attempt(decoder: "Decoder", attempt: int) -> "Decoder":
    if attempt == 0:
        return decoder
    return scaled_down(decoder, SMALLER) if attempt == 1 else copy.deepcopy(decoder).bfloat16()


def checked(chunks: Chunks, z_BCFHW: Tensor, skip: int, last: bool) -> Iterator[Tensor | None]:
    """Chunks after the first `skip`; None and the end where one isn't finite, unless it was the `last` try.

    A chunk is looked at when the next one is on its way, so that the GPU needn't wait for the host.
    """
    waiting: tuple[Tensor, Tensor] | None = None
    narrow = z_BCFHW.dtype == torch.float16 and not z_BCFHW.is_meta and not last
    for index, z_BC1HW in enumerate(torch.split(z_BCFHW, 1, dim=2)):
        frames = chunks.frames(z_BC1HW.contiguous(memory_format=LAST))
        if index < skip:
            continue
        if not narrow:
            yield frames
            continue
        fine = chunks.space.all_agree(frames.isfinite().all())
        if waiting is not None:
            if not waiting[1]:
                yield None
                return
            yield waiting[0]
        waiting = frames, fine
    if waiting is not None:
        yield waiting[0] if waiting[1] else None

"""A video's chunks by the fused decoder, in fp16's narrow range.

Each norm undoes any factor of its input, so a decoder whose residual stream is a power of two smaller
computes the same: where a chunk comes out with infinities or NaN, it is decoded again so (`scaled_down`), and
the rest of the video with it.

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

SMALLER = 2.0**-6  # how much the residual stream shrinks at each try
TRIES = 4  # 1 and three times smaller: 2^18 times fp16's range


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
    done = 0
    for attempt in range(TRIES):
        factor = SMALLER**attempt
        fused = FusedDecoder(scaled_down(decoder, factor) if attempt else decoder, space)
        chunks: Chunks = fused if recordings is None or attempt else recordings.of(fused, z_BCFHW)
        for frames in checked(chunks, z_BCFHW, skip=done, last=attempt == TRIES - 1):
            if frames is None:
                log.warning(
                    "latent frame %d of %d left fp16's range in the VAE: decoded again with a residual "
                    "stream %g times as large", done + 1, z_BCFHW.shape[2], factor * SMALLER
                )  # fmt: skip
                break
            yield frames
            done += 1
        else:
            return


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

"""The resolution stages of the Wan 2.2 VAE: residual blocks with an averaging or duplicating shortcut.

Shapes: B batch, C channels, T frames, H rows, W columns; t and s are factors in time and space.
"""

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from engine.vae_blocks import Downsample, Layer, ResidualBlock, Stream, Upsample, run


def average_down(x_BCTHW: Tensor, out_dim: int, t: int, s: int) -> Tensor:
    """Fold each t x s x s cell into channels, then average groups of channels down to `out_dim`.

    Time is padded with zeros in front, so that the first chunk's single frame falls in a cell's last place.
    """
    x = F.pad(x_BCTHW, (0, 0, 0, 0, -x_BCTHW.shape[2] % t, 0))
    b, c, frames, h, w = x.shape
    x = x.reshape(b, c, frames // t, t, h // s, s, w // s, s).permute(0, 1, 3, 5, 7, 2, 4, 6)
    return x.reshape(b, out_dim, -1, frames // t, h // s, w // s).mean(dim=2)


def duplicate_up(x_BCTHW: Tensor, out_dim: int, t: int, s: int, first: bool) -> Tensor:
    """The reverse: repeat channels and unfold them into t x s x s cells.

    The first chunk holds one frame, so its cell's earlier frames are dropped.
    """
    x = x_BCTHW.repeat_interleave(out_dim * t * s * s // x_BCTHW.shape[1], dim=1)
    b, _, frames, h, w = x.shape
    x = x.reshape(b, out_dim, t, s, s, frames, h, w).permute(0, 1, 5, 2, 6, 3, 7, 4)
    x = x.reshape(b, out_dim, frames * t, h * s, w * s)
    return x[:, :, t - 1 :] if first else x


class DownStage(Layer):
    """Residual blocks, a downsample unless last, and the averaged input added."""

    def __init__(self, in_dim: int, out_dim: int, blocks: int, temporal: bool, last: bool) -> None:
        super().__init__()
        self.out_dim, self.t, self.s = out_dim, 2 if temporal else 1, 1 if last else 2
        dims = [in_dim] + [out_dim] * blocks
        layers: list[nn.Module] = [ResidualBlock(a, b) for a, b in pairwise(dims)]
        if not last:
            layers.append(Downsample(out_dim, temporal))
        self.downsamples = nn.ModuleList(layers)

    def stream(self, x_BCTHW: Tensor, stream: Stream) -> Tensor:
        """The next chunk's output."""
        y = run(self.downsamples, x_BCTHW, stream)
        return y + average_down(x_BCTHW, self.out_dim, self.t, self.s)


class UpStage(Layer):
    """Residual blocks, an upsample with the duplicated input added unless last."""

    def __init__(self, in_dim: int, out_dim: int, blocks: int, temporal: bool, last: bool) -> None:
        super().__init__()
        self.out_dim, self.t, self.last = out_dim, 2 if temporal else 1, last
        dims = [in_dim] + [out_dim] * blocks
        layers: list[nn.Module] = [ResidualBlock(a, b) for a, b in pairwise(dims)]
        if not last:
            layers.append(Upsample(out_dim, out_dim, temporal))
        self.upsamples = nn.ModuleList(layers)

    def stream(self, x_BCTHW: Tensor, stream: Stream) -> Tensor:
        """The next chunk's output."""
        y = run(self.upsamples, x_BCTHW, stream)
        return y if self.last else y + duplicate_up(x_BCTHW, self.out_dim, self.t, 2, stream.first)

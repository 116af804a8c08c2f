"""Pieces of the causal 3-D VAE. Parameter names are the official checkpoints'.

A video goes through in chunks: the first frame (or latent) alone, then 4 frames (or 1 latent) at a time.
Every causal convolution keeps the last frames of its input in a `Stream`, so that chunk by chunk gives
what the whole video at once would. Nothing is written in place: gradients flow through all chunks.

Shapes: B batch, C channels, T frames, H rows, W columns.
Facts: the official `wan/modules/vae2_1.py` and `vae2_2.py` (Wan-Video/Wan2.2, Apache-2.0).
"""

from collections.abc import Callable, Iterable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Convolution = nn.Conv2d | nn.Conv3d
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # of [B, H, L, K]


class Space(Protocol):
    """Which part of each frame is here. The layers themselves know no process group.

    `halo` is how many rows and columns a layer needs around what it computes.
    """

    division: tuple[object, ...]  # how whole frames are divided, the same on all ranks

    def join(self, past_BCTHW: Tensor | None, x_BCTHW: Tensor, frames: int, halo: int) -> Tensor:
        """x with its halo, behind `frames` frames of the past that have theirs (zeros for None)."""
        ...

    def convolve(self, layer: Convolution, x: Tensor, with_halo: bool = False) -> Tensor:
        """`layer(x)`; x [..., H, W] may come with its halo already."""
        ...

    def around(self, shape: list[int], halo: int) -> list[int]:
        """The shape [..., H, W] of a part with its halo."""
        ...

    def inside(self, x: Tensor, halo: int) -> Tensor:
        """The part alone, a view of x [..., H, W] with its halo."""
        ...

    def fill_halo(self, joined_BCTHW: Tensor, past_BCTHW: Tensor, halo: int) -> None:
        """Fill in the halo of a layer's input, whose first frames are the past, and of the next past."""
        ...

    def all_agree(self, flag: Tensor) -> Tensor:
        """Whether a boolean is true on every rank; doesn't wait for the GPU."""
        ...

    def pad_after(self, x: Tensor) -> Tensor:
        """x [..., H, W] with one more row and column at the end."""
        ...

    def cut(self, x: Tensor, unit: int = 1) -> Tensor:
        """This part of a whole frame [..., H, W], whose pixels are `unit` to a latent along a side."""
        ...

    def gather(self, x: Tensor) -> Tensor:
        """The whole frame, on every rank, of the parts."""
        ...

    def collect(self, x: Tensor) -> Tensor | None:
        """The same on rank 0 alone."""
        ...


class WholeFrame:
    """All of each frame is here."""

    division: tuple[object, ...] = ()

    def join(self, past_BCTHW: Tensor | None, x_BCTHW: Tensor, frames: int, halo: int) -> Tensor:
        """Convolutions pad by themselves, so there is no halo."""
        if past_BCTHW is None:
            b, c, _, h, w = x_BCTHW.shape
            past_BCTHW = x_BCTHW.new_zeros(b, c, frames, h, w)
        return torch.cat((past_BCTHW, x_BCTHW), dim=2)

    def convolve(self, layer: Convolution, x: Tensor, with_halo: bool = False) -> Tensor:
        """The layer with its own padding."""
        y: Tensor = layer(x)
        return y

    def around(self, shape: list[int], halo: int) -> list[int]:
        """Convolutions pad by themselves, so there is no halo."""
        return shape

    def inside(self, x: Tensor, halo: int) -> Tensor:
        """All of it."""
        return x

    def fill_halo(self, joined_BCTHW: Tensor, past_BCTHW: Tensor, halo: int) -> None:
        """There is none."""

    def all_agree(self, flag: Tensor) -> Tensor:
        """There is one rank."""
        return flag

    def pad_after(self, x: Tensor) -> Tensor:
        """Zeros."""
        return F.pad(x, (0, 1, 0, 1))

    def cut(self, x: Tensor, unit: int = 1) -> Tensor:
        """All of it."""
        return x

    def gather(self, x: Tensor) -> Tensor:
        """All of it."""
        return x

    def collect(self, x: Tensor) -> Tensor | None:
        """All of it."""
        return x


class Stream:
    """What the layers remember between the chunks of one video."""

    def __init__(self, space: Space | None = None) -> None:
        self.first = True  # whether the present chunk is the video's first
        self.past: dict[nn.Module, Tensor] = {}  # each causal layer's last input frames
        self.space = space or WholeFrame()

    def remember(self, layer: nn.Module, x_BCTHW: Tensor, frames: int, halo: int = 0) -> Tensor:
        """x with the `frames` frames before it in front (zeros before the video); keeps x's last ones."""
        x_BCTHW = self.space.join(self.past.get(layer), x_BCTHW, frames, halo)
        self.past[layer] = x_BCTHW[:, :, -frames:].clone()  # a view would hold the whole chunk
        return x_BCTHW


class Layer(nn.Module):
    """A layer that takes a video chunk by chunk."""

    def stream(self, x_BCTHW: Tensor, stream: Stream) -> Tensor:
        """The next chunk's output."""
        raise NotImplementedError


def run(layers: Iterable[nn.Module], x_BCTHW: Tensor, stream: Stream) -> Tensor:
    """The next chunk through layers one after another."""
    for layer in layers:
        assert isinstance(layer, Layer)
        x_BCTHW = layer.stream(x_BCTHW, stream)
    return x_BCTHW


class CausalConv3d(nn.Conv3d):
    """A convolution that sees no later frame: all its temporal padding is in the past."""

    def __init__(self, in_dim: int, out_dim: int, kernel: int | tuple[int, int, int]) -> None:
        size = (kernel,) * 3 if isinstance(kernel, int) else kernel
        super().__init__(in_dim, out_dim, size, padding=(0, size[1] // 2, size[2] // 2))

    def stream(self, x_BCTHW: Tensor, stream: Stream) -> Tensor:
        """The next chunk's output."""
        frames, halo = self.kernel_size[0] - 1, self.kernel_size[2] // 2
        if not frames:
            return stream.space.convolve(self, x_BCTHW)
        return stream.space.convolve(self, stream.remember(self, x_BCTHW, frames, halo), with_halo=True)


class ChannelNorm(nn.Module):
    """x / |x| over channels, times sqrt(C) and a learned gain; in fp32."""

    def __init__(self, dim: int, axes: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *(1,) * axes))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, ...] normalised, in x's dtype."""
        gain: Tensor = self.gamma.shape[0] ** 0.5 * self.gamma
        return (F.normalize(x.float(), dim=1) * gain).to(x.dtype)


class ResidualBlock(Layer):
    """Norm, SiLU, causal convolution, twice, added to a shortcut."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.residual = nn.ModuleDict(  # the official Sequential's indices; 1 and 4 are SiLU, 5 dropout
            {
                "0": ChannelNorm(in_dim, 3),
                "2": CausalConv3d(in_dim, out_dim, 3),
                "3": ChannelNorm(out_dim, 3),
                "6": CausalConv3d(out_dim, out_dim, 3),
            }
        )
        self.shortcut = CausalConv3d(in_dim, out_dim, 1) if in_dim != out_dim else nn.Identity()

    def stream(self, x_BCTHW: Tensor, stream: Stream) -> Tensor:
        """The next chunk's output."""
        y = x_BCTHW
        for norm, conv in (("0", "2"), ("3", "6")):
            y = stream_conv(self.residual[conv], F.silu(self.residual[norm](y)), stream)
        shortcut: Tensor = self.shortcut(x_BCTHW)
        return y + shortcut


class AttentionBlock(Layer):
    """One-head self-attention over the pixels of each frame by itself."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(dim, 2)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)
        nn.init.zeros_(self.proj.weight)

    def stream(
        self, x_BCTHW: Tensor, stream: Stream, attend: Attend = F.scaled_dot_product_attention
    ) -> Tensor:
        """The next chunk's output; frames don't see one another, so nothing is remembered."""
        b, c, t, h, w = x_BCTHW.shape
        x = x_BCTHW.transpose(1, 2).flatten(0, 1)
        qkv = self.to_qkv(self.norm(x))
        kv = stream.space.gather(qkv[:, c:])  # every pixel looks at the whole frame
        q = qkv[:, :c].flatten(2).transpose(1, 2).unsqueeze(1)
        k, v = kv.flatten(2).transpose(1, 2).unsqueeze(1).chunk(2, dim=-1)
        y = attend(q, k, v).squeeze(1).transpose(1, 2).reshape(b * t, c, h, w)
        out: Tensor = self.proj(y)
        return x_BCTHW + out.view(b, t, c, h, w).transpose(1, 2)


def per_frame(layer: Callable[[Tensor], Tensor], x_BCTHW: Tensor) -> Tensor:
    """A 2-D layer over every frame."""
    b, t = x_BCTHW.shape[0], x_BCTHW.shape[2]
    y = layer(x_BCTHW.transpose(1, 2).flatten(0, 1))
    return y.view(b, t, *y.shape[1:]).transpose(1, 2)


class Downsample(Layer):
    """Half the rows and columns, and with `temporal` half the frames; the first frame keeps its own."""

    def __init__(self, dim: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2))
        self.time_conv = nn.Conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def stream(self, x_BCTHW: Tensor, stream: Stream) -> Tensor:
        """The next chunk's output. Frame 0 skips the time convolution but is the past of frame 1."""
        pad, conv = self.resample
        assert isinstance(pad, nn.ZeroPad2d)
        x = per_frame(lambda x_BCHW: conv(stream.space.pad_after(x_BCHW)), x_BCTHW)
        if self.time_conv is None:
            return x
        if stream.first:
            stream.past[self] = x
            return x
        y: Tensor = self.time_conv(stream.remember(self, x, 1))
        return y


class Upsample(Layer):
    """Twice the rows and columns, and with `temporal` twice the frames, but for the first."""

    def __init__(self, dim: int, out_dim: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2.0, mode="nearest-exact"), nn.Conv2d(dim, out_dim, 3, padding=1)
        )
        self.time_conv = CausalConv3d(dim, 2 * dim, (3, 1, 1)) if temporal else None

    def stream(self, x_BCTHW: Tensor, stream: Stream) -> Tensor:
        """The next chunk's output. Frame 0 skips the time convolution; later frames see zeros for it."""
        if self.time_conv is not None and not stream.first:
            b, c, t, h, w = x_BCTHW.shape
            pairs = self.time_conv.stream(x_BCTHW, stream).view(b, 2, c, t, h, w)
            x_BCTHW = pairs.permute(0, 2, 3, 1, 4, 5).reshape(b, c, 2 * t, h, w)
        double, conv = self.resample
        assert isinstance(conv, nn.Conv2d)
        return per_frame(lambda x_BCHW: stream.space.convolve(conv, double(x_BCHW)), x_BCTHW)


def stream_conv(layer: nn.Module, x_BCTHW: Tensor, stream: Stream) -> Tensor:
    """`layer.stream` of a causal convolution held in a container."""
    assert isinstance(layer, CausalConv3d)
    return layer.stream(x_BCTHW, stream)

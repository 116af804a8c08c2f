"""The VAE over ranks: each holds a stripe of every frame.

Convolutions take the rows or columns next to their stripe from its neighbours (the halo), so every pixel is
computed from what an unsplit frame would give it. The middle attention gathers the whole frame's keys and
values. Nothing else in the VAE looks sideways.

Shapes: B batch, C channels, T frames, H rows, W columns; tensors are [..., H, W].
"""

from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from engine.parallel.collectives import all_gather
from engine.vae_blocks import Convolution

Axis = Literal[-1, -2]  # columns or rows: the dimension that is cut


def stripes(size: int, ranks: int) -> list[int]:
    """Latents a rank along the cut axis: as even as it goes, the wider first."""
    return [size // ranks + (rank < size % ranks) for rank in range(ranks)]


def best_axis(rows: int, columns: int, ranks: int) -> Axis:
    """The axis whose widest stripe is the smaller share of a frame, of those with a latent for each rank."""
    if min(rows, columns) < ranks:
        return -1 if columns >= rows else -2
    return -1 if max(stripes(columns, ranks)) / columns <= max(stripes(rows, ranks)) / rows else -2


class StripedFrame:
    """See `engine.vae_blocks.Space`. All ranks make the same calls. No gradients."""

    def __init__(self, group: dist.ProcessGroup | None, rows: int, columns: int) -> None:
        """For frames of rows x columns latents; each rank must get at least one."""
        self.group = group
        self.rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        self.axis = best_axis(rows, columns, ranks)
        self.sizes = stripes(columns if self.axis == -1 else rows, ranks)
        assert min(self.sizes) > 0, f"{rows} x {columns} latents are too few for {ranks} ranks"
        self.division: tuple[object, ...] = (rows, columns, self.axis, *self.sizes)

    def join(self, past_BCTHW: Tensor | None, x_BCTHW: Tensor, frames: int, halo: int) -> Tensor:
        """One buffer: the past, then x between its neighbours' edges, which travel while x is copied."""
        if halo == 0:
            past = x_BCTHW.new_zeros(*x_BCTHW.shape[:2], frames, *x_BCTHW.shape[3:])
            return torch.cat((past if past_BCTHW is None else past_BCTHW, x_BCTHW), dim=2)
        edges = Edges(self, x_BCTHW, halo, halo)
        shape = list(x_BCTHW.shape)
        shape[2] += frames
        shape[self.axis] += 2 * halo
        joined = _empty_like(x_BCTHW, shape)
        if past_BCTHW is None:
            joined[:, :, :frames].zero_()
        else:
            joined[:, :, :frames] = past_BCTHW
        present = joined[:, :, frames:]
        present.narrow(self.axis, halo, x_BCTHW.shape[self.axis]).copy_(x_BCTHW)
        before, after = edges.wait()
        _fill(present.narrow(self.axis, 0, halo), before)
        _fill(present.narrow(self.axis, shape[self.axis] - halo, halo), after)
        return joined

    def convolve(self, layer: Convolution, x: Tensor, with_halo: bool = False) -> Tensor:
        """The layer without its own padding along the cut axis."""
        assert not isinstance(layer.padding, str)
        padding = list(layer.padding)
        halo = padding[self.axis]
        if halo and not with_halo:
            x = self._between_edges(x, halo)
        padding[self.axis] = 0
        convolution = F.conv2d if x.ndim == 4 else F.conv3d
        return convolution(x, layer.weight, layer.bias, layer.stride, padding, layer.dilation, layer.groups)

    def _between_edges(self, x: Tensor, halo: int) -> Tensor:
        """x with its halo, in x's order of memory; the neighbours' edges travel while x is copied."""
        edges = Edges(self, x, halo, halo)
        joined = _empty_like(x, self.around(list(x.shape), halo))
        self.inside(joined, halo).copy_(x)
        before, after = edges.wait()
        _fill(joined.narrow(self.axis, 0, halo), before)
        _fill(joined.narrow(self.axis, joined.shape[self.axis] - halo, halo), after)
        return joined

    def around(self, shape: list[int], halo: int) -> list[int]:
        """Wider along the cut axis by the halo on both sides."""
        shape = list(shape)
        shape[self.axis] += 2 * halo
        return shape

    def inside(self, x: Tensor, halo: int) -> Tensor:
        """Without the halo on both sides."""
        return x.narrow(self.axis, halo, x.shape[self.axis] - 2 * halo)

    def fill_halo(self, joined_BCTHW: Tensor, past_BCTHW: Tensor, halo: int) -> None:
        """The new frames' edges come from the neighbours, the earlier ones' from the past's own halo."""
        if halo == 0:
            return
        frames = past_BCTHW.shape[2]
        edges = Edges(self, self.inside(joined_BCTHW[:, :, frames:], halo), halo, halo)
        for start, lines in zip((0, past_BCTHW.shape[self.axis] - halo), edges.wait(), strict=True):
            joined = joined_BCTHW.narrow(self.axis, start, halo)
            if lines is None:  # so is the past's halo there, from the start
                joined.zero_()
                continue
            past = past_BCTHW.narrow(self.axis, start, halo)
            joined[:, :, :frames] = past
            joined[:, :, frames:] = lines
            past.copy_(joined[:, :, -frames:])

    def all_agree(self, flag: Tensor) -> Tensor:
        """The least of all ranks' flags."""
        number = flag.to(torch.int32)
        dist.all_reduce(number, dist.ReduceOp.MIN, self.group)
        return number.bool()

    def pad_after(self, x: Tensor) -> Tensor:
        """The next stripe's first line along the cut axis (zeros after the last), zeros along the other."""
        _, after = Edges(self, x, 0, 1).wait()
        if after is None:
            return F.pad(x, (0, 1, 0, 1))
        x = torch.cat((x, after), dim=self.axis)
        return F.pad(x, (0, 0, 0, 1) if self.axis == -1 else (0, 1))

    def cut(self, x: Tensor, unit: int = 1) -> Tensor:
        """This rank's stripe."""
        return x.narrow(self.axis, sum(self.sizes[: self.rank]) * unit, self.sizes[self.rank] * unit)

    def gather(self, x: Tensor) -> Tensor:
        """All stripes side by side; the narrower ones travel with padding."""
        unit = x.shape[self.axis] // self.sizes[self.rank]
        missing = (max(self.sizes) - self.sizes[self.rank]) * unit
        if missing:
            x = F.pad(x, (0, missing) if self.axis == -1 else (0, 0, 0, missing))
        parts = all_gather(x, self.group).unbind(0)
        cut = [p.narrow(self.axis, 0, size * unit) for p, size in zip(parts, self.sizes, strict=True)]
        return torch.cat(cut, dim=self.axis)

    def collect(self, x: Tensor) -> Tensor | None:
        """All stripes side by side on rank 0; the others go on once theirs is sent."""
        unit = x.shape[self.axis] // self.sizes[self.rank]
        if self.rank:
            for work in _together([dist.P2POp(dist.isend, x.contiguous(), 0, self.group)]):
                work.wait()
            return None
        parts = [x]
        for size in self.sizes[1:]:
            shape = list(x.shape)
            shape[self.axis] = size * unit
            parts.append(x.new_empty(shape))
        receives = [
            dist.P2POp(dist.irecv, part, self._global(rank), self.group)
            for rank, part in enumerate(parts)
            if rank
        ]
        for work in _together(receives):
            work.wait()
        return torch.cat(parts, dim=self.axis)

    def neighbour(self, step: int) -> int | None:
        """The rank of the stripe before (-1) or after (1) mine, None at the frame's edge."""
        other = self.rank + step
        return self._global(other) if 0 <= other < len(self.sizes) else None

    def _global(self, rank: int) -> int:
        return rank if self.group is None else dist.get_global_rank(self.group, rank)


class Edges:
    """The lines next to a stripe, on their way from its neighbours; None (zeros) where the frame ends."""

    def __init__(self, frame: StripedFrame, x: Tensor, before: int, after: int) -> None:
        """Give each neighbour what it wants of x; ask for `before` and `after` lines."""
        shape = list(x.shape)
        self._received: list[Tensor | None] = []
        self._sent: list[Tensor] = []  # kept until sent
        operations: list[dist.P2POp] = []
        size = x.shape[frame.axis]
        # (who gives me lines, how many; what that rank wants of me: how many, from where)
        sides = ((-1, before, after, 0), (1, after, before, size - before))
        for step, wanted, given, start in sides:
            shape[frame.axis] = wanted
            peer = frame.neighbour(step)
            if peer is None:
                self._received.append(None)
                continue
            lines = x.new_empty(shape)
            self._received.append(lines)
            if given:
                self._sent.append(x.narrow(frame.axis, start, given).contiguous())
                operations.append(dist.P2POp(dist.isend, self._sent[-1], peer, frame.group))
            if wanted:
                operations.append(dist.P2POp(dist.irecv, lines, peer, frame.group))
        self._works = _together(operations)

    def wait(self) -> tuple[Tensor | None, Tensor | None]:
        """(lines before, lines after)."""
        for work in self._works:
            work.wait()
        before, after = self._received
        return before, after


def _fill(into: Tensor, lines: Tensor | None) -> None:
    if lines is None:
        into.zero_()
    else:
        into.copy_(lines)


def _together(operations: list[dist.P2POp]) -> list[dist.Work]:
    return dist.batch_isend_irecv(operations) if operations else []


def _empty_like(x: Tensor, shape: list[int]) -> Tensor:
    """Memory in x's order of dimensions."""
    last = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
    channels_last = x.is_contiguous(memory_format=last) and not x.is_contiguous()
    return torch.empty(
        shape,
        dtype=x.dtype,
        device=x.device,
        memory_format=last if channels_last else torch.contiguous_format,
    )

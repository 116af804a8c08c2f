"""The exchange by pushing into the other ranks' memory: no rank waits for another to be ready.

Each rank has a window that the others can write: for q, k, v and o of each lane a region at a fixed place,
and a counter for each piece that arrives. A push copies each piece to where its reader wants it, then sets
the piece's counter behind it. A reader waits for the counters.

No acknowledgement is needed before a region is written again. I push the next block's q, k and v only after
I have every rank's output of this block, so every rank has read this block's q, k and v. I push the next
output only after I have every rank's next q, k and v, which they sent after they had read this output.

Shapes as in `engine.parallel.exchange`.
"""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from engine.attention import QKV
from engine.parallel.exchange import Traffic

Region = Literal["q", "k", "v", "o"]
REGIONS: tuple[Region, ...] = ("q", "k", "v", "o")
LANES = 2  # the two guidance passes
GROUPS = 2  # of heads, at most
ALIGNMENT = 256  # bytes


class Window(Protocol):
    """Memory that all ranks can write. `reserve` is a collective call, all others are one-sided."""

    def reserve(self, size: int, counters: int) -> None:
        """`size` bytes of memory and `counters` zeroed counters on every rank, in place of what was there."""
        ...

    def memory(self, rank: int) -> Tensor:
        """A rank's bytes, uint8."""
        ...

    def fence(self) -> None:
        """Copies from now on see what was computed until now."""
        ...

    def copy(self, into_NM: Tensor, source_NM: Tensor) -> None:
        """Begin a copy of rows; `into` may be on another rank."""
        ...

    def signal(self, rank: int, counter: int, value: int) -> None:
        """Set a rank's counter once the copies so far are done."""
        ...

    def wait(self, counter: int, value: int) -> None:
        """What is computed from now on waits until my counter is `value` or more."""
        ...

    def close(self) -> None:
        """Give the memory back."""
        ...


@dataclass(frozen=True)
class Route:
    """Where each of the R pieces of my data goes: to which rank, and to which place among its R."""

    rank: int  # who I am
    mine: int  # the piece that I keep, and its place
    targets: tuple[tuple[int, int], ...]  # (rank, place) of every piece

    @staticmethod
    def straight(rank: int, ranks: int) -> "Route":
        """Piece r goes to rank r, to the place of this rank."""
        return Route(rank, rank, tuple((r, rank) for r in range(ranks)))


class PushTransport:
    """Pushes through a window. While `silent`, only what I keep moves: a benchmark's control."""

    def __init__(self, window: Window, route: Route, name: str) -> None:
        self.window, self.route, self.name = window, route, name
        self.rank, self.ranks = route.rank, len(route.targets)
        self.silent = False
        self._region_bytes = 0
        self._pushes: Counter[tuple[int, str, int]] = Counter()

    def exchange(self, traffic: Traffic, lane: int) -> "PushExchange":
        """Start one self-attention's traffic in its lane's regions."""
        # Regions stay in place whatever the traffic: moving them would need acknowledgements.
        if self._region_bytes < traffic.bytes:
            self._region_bytes = (traffic.bytes + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
            regions = LANES * len(REGIONS)
            self.window.reserve(regions * self._region_bytes, regions * GROUPS * self.ranks)
            self._pushes.clear()
        return PushExchange(self, traffic, lane)

    def close(self) -> None:
        """Give the window back."""
        self.window.close()

    def region(self, rank: int, lane: int, name: Region, traffic: Traffic) -> Tensor:
        """A rank's memory for one of q, k, v and o: `traffic.elements` of its dtype."""
        start = (lane * len(REGIONS) + REGIONS.index(name)) * self._region_bytes
        return self.window.memory(rank)[start : start + traffic.bytes].view(traffic.dtype)

    def counter(self, lane: int, name: Region, group: int, place: int) -> int:
        """The number of the counter behind the piece at a place."""
        return ((lane * len(REGIONS) + REGIONS.index(name)) * GROUPS + group) * self.ranks + place

    def count(self, lane: int, name: Region, group: int) -> int:
        """The number of this push. All ranks push alike, so it is also what my counters will show."""
        self._pushes[lane, name, group] += 1
        return self._pushes[lane, name, group]

    def wait(self, lane: int, name: Region, group: int) -> None:
        """Wait until the pieces at all places are as new as my own last push."""
        for place in range(self.ranks):
            if not self.silent or place == self.route.mine:
                number = self._pushes[lane, name, group]
                self.window.wait(self.counter(lane, name, group, place), number)


class PushExchange:
    """See `engine.parallel.exchange.Exchange`."""

    def __init__(self, transport: PushTransport, traffic: Traffic, lane: int) -> None:
        self._by, self._traffic, self._lane = transport, traffic, lane

    def send(self, name: QKV, x: Tensor, packed: bool) -> None:
        """Push every rank its heads."""
        traffic, layout = self._traffic, self._traffic.layout
        if packed:
            parts = layout.parts(x, traffic.batch, traffic.tokens)
        else:
            parts = layout.slices(x.view(traffic.batch, traffic.tokens, layout.heads, traffic.head_dim))
        self._by.window.fence()
        for group, part_BRlGK in enumerate(parts):
            self._push(name, group, part_BRlGK.flatten(3))

    def receive(self, name: QKV, group: int) -> Tensor:
        """The region itself, once every rank's piece is in it."""
        self._by.wait(self._lane, name, group)
        return self._received(self._by.route.rank, name, group)

    def send_back(self, group: int, o_BLGK: Tensor) -> None:
        """Push every rank its tokens."""
        layout = self._traffic.layout
        o_BRl_ = torch.unflatten(o_BLGK.flatten(2), 1, (layout.ranks, self._traffic.tokens))
        self._by.window.fence()
        self._push("o", group, o_BRl_)

    def receive_back(self, group: int) -> Tensor:
        """A slice of the region's columns, once every rank's piece is in it."""
        self._by.wait(self._lane, "o", group)
        return self._output(self._by.route.rank)[:, :, self._traffic.columns(group)]

    def _push(self, name: Region, group: int, sent_BRl_: Tensor) -> None:
        """Copy each piece to its rank and place, from the next rank on so that none is flooded; mine last."""
        window, route, ranks = self._by.window, self._by.route, self._by.ranks
        number = self._by.count(self._lane, name, group)
        for piece in ((route.mine + step) % ranks for step in range(1, ranks + 1)):
            if self._by.silent and piece != route.mine:
                continue
            rank, place = route.targets[piece]
            target_Bl_ = self._target(rank, name, group, place)
            for into, source in zip(target_Bl_, sent_BRl_[:, piece], strict=True):
                window.copy(into, source)
            window.signal(rank, self._by.counter(self._lane, name, group, place), number)

    def _target(self, rank: int, name: Region, group: int, place: int) -> Tensor:
        """[B, l, G * K] of a rank's memory: where the piece for a place goes."""
        traffic = self._traffic
        width = traffic.layout.groups[group] * traffic.head_dim
        if name == "o":
            start = traffic.columns(group).start + place * width
            return self._output(rank)[:, :, start : start + width]
        received = self._received(rank, name, group).flatten(2)
        return received[:, place * traffic.tokens : (place + 1) * traffic.tokens]

    def _received(self, rank: int, name: QKV, group: int) -> Tensor:
        """[B, L, G, K] in a rank's memory: one group after another."""
        traffic = self._traffic
        shape = traffic.received(group)
        start = traffic.batch * traffic.tokens * traffic.layout.first(group) * traffic.head_dim
        region = self._by.region(rank, self._lane, name, traffic)
        return region[start : start + math.prod(shape)].view(shape)

    def _output(self, rank: int) -> Tensor:
        """[B, l, H * K] in a rank's memory."""
        region = self._by.region(rank, self._lane, "o", self._traffic)
        return region.view(self._traffic.batch, self._traffic.tokens, -1)

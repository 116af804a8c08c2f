"""The exchange by all-to-all collectives: NCCL on GPUs, gloo on CPUs.

One collective a batch entry and group of heads, started at once and waited for when its data is needed, so
what is received lies as attention reads it. The way back needs one copy that brings the ranks' heads side
by side; the push transport needs none.

Shapes as in `engine.parallel.exchange`.
"""

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from engine.attention import QKV
from engine.parallel.exchange import Traffic


class CollectiveTransport:
    """`all_to_all_single` over a process group; `pieces` of the data for each rank, one if not given."""

    def __init__(self, group: dist.ProcessGroup, pieces: Sequence[int] | None = None) -> None:
        self.group = group
        self.pieces = list(pieces or [1] * dist.get_world_size(group))
        self.rank, self.ranks = dist.get_rank(group), sum(self.pieces)
        self.name = f"{dist.get_backend(group)} all-to-all"

    def exchange(self, traffic: Traffic, lane: int) -> "CollectiveExchange":
        """Start one self-attention's traffic; lanes need no care, as nothing is shared between runs."""
        return CollectiveExchange(self, traffic)

    def close(self) -> None:
        """Nothing is kept."""


class CollectiveExchange:
    """See `engine.parallel.exchange.Exchange`."""

    def __init__(self, transport: CollectiveTransport, traffic: Traffic) -> None:
        self._by, self._traffic = transport, traffic
        self._coming: dict[tuple[str, int], tuple[Tensor, list[dist.Work]]] = {}

    def send(self, name: QKV, x: Tensor, packed: bool) -> None:
        """Start a collective for each group of heads."""
        traffic = self._traffic
        layout = traffic.layout
        sent = x if packed else layout.pack(x.view(traffic.batch, traffic.tokens, layout.heads, -1))
        for group, part_BRlGK in enumerate(layout.parts(sent, traffic.batch, traffic.tokens)):
            self._start(name, group, part_BRlGK, part_BRlGK.new_empty(traffic.received(group)))

    def receive(self, name: QKV, group: int) -> Tensor:
        """Wait for one group."""
        return self._wait(name, group)

    def send_back(self, group: int, o_BLGK: Tensor) -> None:
        """Each rank's tokens are one piece of o already."""
        traffic = self._traffic
        o_BRl_ = o_BLGK.contiguous().view(traffic.batch, traffic.layout.ranks, traffic.tokens, -1)
        self._start("o", group, o_BRl_, o_BRl_.new_empty(o_BRl_.shape))

    def receive_back(self, group: int) -> Tensor:
        """The ranks' heads side by side: a copy."""
        return self._wait("o", group).movedim(1, 2).flatten(2)

    def _start(self, name: str, group: int, sent: Tensor, received: Tensor) -> None:
        pieces = self._by.pieces
        works = [
            dist.all_to_all_single(into, source, pieces, pieces, group=self._by.group, async_op=True)
            for into, source in zip(
                received.view(len(sent), self._traffic.layout.ranks, -1), sent.flatten(2), strict=True
            )
        ]
        self._coming[name, group] = received, [work for work in works if work is not None]

    def _wait(self, name: str, group: int) -> Tensor:
        received, works = self._coming.pop((name, group))
        for work in works:
            work.wait()
        return received

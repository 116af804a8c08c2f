"""Sequence parallelism by all-to-all (DeepSpeed-Ulysses, arXiv:2309.14509).

Tokens are split over u ranks, padded at the end to equal parts. Around self-attention an all-to-all turns
"my tokens, all heads" into "all tokens, my heads" and back. Padding is cut off the keys before attention, so
no mask is needed. The transport carries the data while the model computes what it can (`Overlap`).

Shapes: B batch, l this rank's tokens, L all tokens (padded), H heads, K head dimension, R ranks, G heads of a
rank in one group.
"""

from collections.abc import Callable, Iterator

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from engine.attention import QKV, Attend, Overlap, sdpa
from engine.parallel.collective import CollectiveTransport
from engine.parallel.collectives import all_gather
from engine.parallel.exchange import Exchange, Traffic, Transport
from kernels.qk_norm_rope import SendLayout


class UlyssesSequence:
    """The part of a sequence that one of the group's ranks holds."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        attend: Attend = sdpa,
        cross_attend: Attend | None = None,
        transport: Transport | None = None,
        overlap: Overlap | None = None,
        on_begin: Callable[[], None] = lambda: None,
    ) -> None:
        self.group = group
        self.ranks = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        self.attend = attend
        self.cross_attend = cross_attend or attend
        self.transport = transport or CollectiveTransport(group)
        self.overlap = overlap or Overlap()
        self._on_begin = on_begin  # a sign of life, some times a step

    def part(self, length: int) -> int:
        """Tokens a rank, padding included."""
        return -(-length // self.ranks)

    def shard(self, x: Tensor, dim: int) -> Tensor:
        """This rank's part along `dim`, zero-padded at the end."""
        part = self.part(x.shape[dim])
        start = min(self.rank * part, x.shape[dim])
        mine = x.narrow(dim, start, min(part, x.shape[dim] - start))
        missing = part - mine.shape[dim]
        return F.pad(mine, (0, 0) * (x.ndim - 1 - dim) + (0, missing)) if missing else mine

    def gather(self, x: Tensor, dim: int, length: int) -> Tensor:
        """The parts of all ranks, joined along `dim`, padding cut off."""
        return all_gather(x, self.group).movedim(0, dim).flatten(dim, dim + 1).narrow(dim, 0, length)

    def split(self, first: int, length: int) -> int:
        """How many of this rank's tokens are among the first `first` of the sequence."""
        part = self.part(length)
        return max(0, min(part, first - self.rank * part))

    def begin(self, shape: tuple[int, int, int, int], like: Tensor, lane: int = 0) -> "UlyssesRun":
        """Start a self-attention of [B, l, H, K] tokens here."""
        self._on_begin()
        batch, tokens, heads, head_dim = shape
        layout = SendLayout.of(heads, self.transport.ranks, self.overlap.head_groups)
        traffic = Traffic(batch, tokens, layout, head_dim, like.dtype, like.device)
        return UlyssesRun(self.transport.exchange(traffic, lane), traffic, self.attend)

    def self_attention(self, q_BlHK: Tensor, k_BlHK: Tensor, v_BlHK: Tensor, length: int) -> Tensor:
        """This rank's tokens' attention over all tokens, [B, l, H, K]."""
        run = self.begin((*q_BlHK.shape[:3], q_BlHK.shape[3]), v_BlHK)
        run.send("v", v_BlHK, packed=False)
        run.send("q", q_BlHK, packed=False)
        run.send("k", k_BlHK, packed=False)
        run.attend(length)
        o_BlHK = q_BlHK.new_empty(q_BlHK.shape)
        for columns, o_Bl_ in run.outputs():
            o_BlHK.flatten(2)[:, :, columns] = o_Bl_
        return o_BlHK

    def cross_attention(self, q_BLHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor) -> Tensor:
        """Plain attention: every rank holds the whole text."""
        return self.cross_attend(q_BLHK, k_BTHK, v_BTHK)


class UlyssesRun:
    """See `engine.attention.AttentionRun`."""

    def __init__(self, exchange: Exchange, traffic: Traffic, attend: Attend) -> None:
        self.layout = traffic.layout
        self._exchange, self._traffic, self._attend = exchange, traffic, attend

    def send(self, name: QKV, x: Tensor, packed: bool = True) -> None:
        """Give away the other ranks' heads."""
        self._exchange.send(name, x, packed)

    def attend(self, length: int) -> None:
        """Group by group: attend with my heads over all tokens, and send each rank its tokens' output."""
        for group in range(len(self.layout.groups)):
            v_BLGK, q_BLGK, k_BLGK = (self._exchange.receive(name, group) for name in ("v", "q", "k"))
            o_BLGK = self._attend(q_BLGK, k_BLGK[:, :length], v_BLGK[:, :length])
            self._exchange.send_back(group, o_BLGK)

    def outputs(self) -> Iterator[tuple[slice, Tensor]]:
        """As the groups come back."""
        for group in range(len(self.layout.groups)):
            yield self._traffic.columns(group), self._exchange.receive_back(group)

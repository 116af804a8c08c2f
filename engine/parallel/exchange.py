"""What carries q, k, v and the output of one self-attention between ranks: the interface of the transports.

Shapes: B batch, l this rank's tokens, L = R * l all tokens, H heads, K head dimension, R ranks, G heads of a
rank in one group of the layout.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.attention import QKV
from kernels.qk_norm_rope import SendLayout


@dataclass(frozen=True)
class Traffic:
    """The shape of one self-attention's traffic."""

    batch: int
    tokens: int  # l, on each rank, padding included
    layout: SendLayout
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def elements(self) -> int:
        """Of q, as of k, v and the output: the same before and after the exchange."""
        return self.batch * self.tokens * self.layout.heads * self.head_dim

    @property
    def bytes(self) -> int:
        """Of q, as of k, v and the output."""
        return self.elements * self.dtype.itemsize

    def received(self, group: int) -> tuple[int, int, int, int]:
        """[B, L, G, K] of one group: all tokens of this rank's heads."""
        tokens = self.tokens * self.layout.ranks
        return self.batch, tokens, self.layout.groups[group], self.head_dim

    def columns(self, group: int) -> slice:
        """Where one group's output lies among H * K features."""
        first = self.layout.first(group)
        width = self.layout.ranks * self.layout.groups[group]
        return slice(first * self.head_dim, (first + width) * self.head_dim)


class Exchange(Protocol):
    """The traffic of one self-attention, in both directions; calls on all ranks come in the same order."""

    def send(self, name: QKV, x: Tensor, packed: bool) -> None:
        """Begin to give away the other ranks' heads of my tokens; x lies in the layout or token by token."""
        ...

    def receive(self, name: QKV, group: int) -> Tensor:
        """[B, L, G, K]: all tokens of my heads, once they are here."""
        ...

    def send_back(self, group: int, o_BLGK: Tensor) -> None:
        """Begin to give the other ranks the output of their tokens."""
        ...

    def receive_back(self, group: int) -> Tensor:
        """[B, l, R * G * K]: my tokens' output of the group's heads, once it is here."""
        ...


class Transport(Protocol):
    """A way to move tensors between the ranks of one sequence."""

    name: str  # for the log
    rank: int  # this one, of
    ranks: int

    def exchange(self, traffic: Traffic, lane: int) -> Exchange:
        """Start one self-attention's traffic; runs of different lanes may overlap in time."""
        ...

    def close(self) -> None:
        """Give back what is shared with the other ranks."""
        ...

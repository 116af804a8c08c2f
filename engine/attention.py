"""Attention backends, and what a transformer asks of the sequence it sees.

Shapes: B batch, L query tokens, T key tokens, H heads, K head dimension.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.qk_norm_rope import SendLayout

QKV = Literal["q", "k", "v"]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q [B, L, H, K], k and v [B, T, H, K] -> [B, L, H, K]


def sdpa(q_BLHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K)) v by torch; every key counts (callers cut padding off)."""
    q, k, v = (x.transpose(1, 2) for x in (q_BLHK, k_BTHK, v_BTHK))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def pick_attend(
    kind: Literal["self", "cross"], dtype: torch.dtype, head_dim: int, device: torch.device
) -> Attend:
    """The fastest attention for this device: on a GPU the one that passes `kernels.attention`'s probe."""
    if device.type != "cuda":
        return sdpa
    from kernels.attention import choose

    return choose(kind, dtype, head_dim, device)


@dataclass(frozen=True)
class Overlap:
    """What is done so that ranks compute while they send; each is switchable, none changes a formula."""

    split_qkv: bool = True  # project v, q, k one after another, each sent while the next is computed
    head_groups: int = 1  # 2: return one half of the heads' output while the other half is attended
    interleave: bool = True  # with two guidance passes on a rank, one sends while the other computes


class AttentionRun(Protocol):
    """One self-attention under way: send q, k and v in any order, attend, take the output.

    What happens between the calls happens while data is in flight.
    """

    layout: SendLayout  # in which `send` takes packed tensors

    def send(self, name: QKV, x: Tensor, packed: bool = True) -> None:
        """Give q, k or v of this rank's tokens: [B, L, H, K] elements in `layout`, or token by token."""
        ...

    def attend(self, length: int) -> None:
        """Attention over the whole sequence of `length` real tokens; begins the output's way back."""
        ...

    def outputs(self) -> Iterator[tuple[slice, Tensor]]:
        """This rank's tokens' output as it arrives: (columns of H * K, [B, L, columns]), in order."""
        ...


class Sequence(Protocol):
    """How a model's tokens are laid out over ranks. The model itself knows no process group.

    `length` is always the real number of tokens of the whole sequence, without padding.
    """

    ranks: int  # over which the tokens are spread
    overlap: Overlap

    def shard(self, x: Tensor, dim: int) -> Tensor:
        """This rank's part of a whole sequence along `dim`, zero-padded at the end to equal parts."""
        ...

    def gather(self, x: Tensor, dim: int, length: int) -> Tensor:
        """The inverse of `shard`: the whole sequence on every rank, padding cut off."""
        ...

    def split(self, first: int, length: int) -> int:
        """How many of this rank's tokens are among the first `first` of the sequence."""
        ...

    def begin(self, shape: tuple[int, int, int, int], like: Tensor, lane: int = 0) -> AttentionRun:
        """Start a self-attention of [B, L, H, K] tokens here, of `like`'s dtype and device.

        Runs of different lanes may overlap in time; within a lane one follows the other.
        """
        ...

    def self_attention(self, q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor, length: int) -> Tensor:
        """Attention of this rank's queries over the keys of all ranks; padding is never a key."""
        ...

    def cross_attention(self, q_BLHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor) -> Tensor:
        """Attention of this rank's queries over keys that every rank holds."""
        ...


class WholeRun:
    """Self-attention where one rank holds every token: nothing is sent."""

    def __init__(self, attend: Attend, shape: tuple[int, int, int, int]) -> None:
        self.layout = SendLayout.of(shape[2])
        self._attend, self._shape = attend, shape
        self._qkv: dict[QKV, Tensor] = {}
        self._out: Tensor | None = None

    def send(self, name: QKV, x: Tensor, packed: bool = True) -> None:
        """Keep it."""
        self._qkv[name] = x.view(self._shape)

    def attend(self, length: int) -> None:
        """Plain attention."""
        self._out = self._attend(self._qkv.pop("q"), self._qkv.pop("k"), self._qkv.pop("v"))

    def outputs(self) -> Iterator[tuple[slice, Tensor]]:
        """All of it."""
        assert self._out is not None, "outputs() before attend()"
        yield slice(0, self._shape[2] * self._shape[3]), self._out.flatten(2)


class WholeSequence:
    """One rank holds every token."""

    ranks = 1
    overlap = Overlap(split_qkv=False, interleave=False)

    def __init__(
        self,
        attend: Attend = sdpa,
        cross_attend: Attend | None = None,
        on_begin: Callable[[], None] = lambda: None,
    ) -> None:
        self.attend = attend
        self.cross_attend = cross_attend or attend
        self._on_begin = on_begin  # a sign of life, some times a step

    def shard(self, x: Tensor, dim: int) -> Tensor:
        """All of it."""
        return x

    def gather(self, x: Tensor, dim: int, length: int) -> Tensor:
        """All of it."""
        return x

    def split(self, first: int, length: int) -> int:
        """All of the first."""
        return first

    def begin(self, shape: tuple[int, int, int, int], like: Tensor, lane: int = 0) -> AttentionRun:
        """Attention without any sending."""
        self._on_begin()
        return WholeRun(self.attend, shape)

    def self_attention(self, q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor, length: int) -> Tensor:
        """Plain attention."""
        self._on_begin()
        return self.attend(q_BLHK, k_BLHK, v_BLHK)

    def cross_attention(self, q_BLHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor) -> Tensor:
        """Plain attention over the text."""
        return self.cross_attend(q_BLHK, k_BTHK, v_BTHK)

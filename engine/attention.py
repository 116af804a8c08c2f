"""Attention backends, and what a transformer asks of the sequence it sees.

Shapes: B batch, L query tokens, T key tokens, H heads, K head dimension.
"""

from collections.abc import Callable
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

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


class Sequence(Protocol):
    """How a model's tokens are laid out over ranks. The model itself knows no process group.

    `length` is always the real number of tokens of the whole sequence, without padding.
    """

    ranks: int  # over which the tokens are spread

    def shard(self, x: Tensor, dim: int) -> Tensor:
        """This rank's part of a whole sequence along `dim`, zero-padded at the end to equal parts."""
        ...

    def gather(self, x: Tensor, dim: int, length: int) -> Tensor:
        """The inverse of `shard`: the whole sequence on every rank, padding cut off."""
        ...

    def split(self, first: int, length: int) -> int:
        """How many of this rank's tokens are among the first `first` of the sequence."""
        ...

    def self_attention(self, q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor, length: int) -> Tensor:
        """Attention of this rank's queries over the keys of all ranks; padding is never a key."""
        ...

    def attend_by_rank(self, q_RBLGK: Tensor, k_RBLGK: Tensor, v_RBLGK: Tensor, length: int) -> Tensor:
        """`self_attention` of inputs whose heads are grouped by the rank that attends them: [B, L, H * K].

        R ranks, G = H / R heads each: the layout in which an all-to-all sends.
        """
        ...

    def cross_attention(self, q_BLHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor) -> Tensor:
        """Attention of this rank's queries over keys that every rank holds."""
        ...


class WholeSequence:
    """One rank holds every token."""

    ranks = 1

    def __init__(self, attend: Attend = sdpa, cross_attend: Attend | None = None) -> None:
        self.attend = attend
        self.cross_attend = cross_attend or attend

    def shard(self, x: Tensor, dim: int) -> Tensor:
        """All of it."""
        return x

    def gather(self, x: Tensor, dim: int, length: int) -> Tensor:
        """All of it."""
        return x

    def split(self, first: int, length: int) -> int:
        """All of the first."""
        return first

    def self_attention(self, q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor, length: int) -> Tensor:
        """Plain attention."""
        return self.attend(q_BLHK, k_BLHK, v_BLHK)

    def attend_by_rank(self, q_RBLGK: Tensor, k_RBLGK: Tensor, v_RBLGK: Tensor, length: int) -> Tensor:
        """Plain attention of the one rank's heads."""
        return self.attend(q_RBLGK[0], k_RBLGK[0], v_RBLGK[0]).flatten(2)

    def cross_attention(self, q_BLHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor) -> Tensor:
        """Plain attention over the text."""
        return self.cross_attend(q_BLHK, k_BTHK, v_BTHK)

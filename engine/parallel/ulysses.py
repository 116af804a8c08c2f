"""Sequence parallelism by all-to-all (DeepSpeed-Ulysses, arXiv:2309.14509).

Tokens are split over u ranks, padded at the end to equal parts. Around self-attention an all-to-all turns
"my tokens, all heads" into "all tokens, my heads" and back. Padding is cut off the keys before attention, so
no mask is needed.

Shapes: B batch, l this rank's tokens, L all tokens (padded), H heads, h = H/u heads of a rank, K head
dimension, u ranks.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from engine.attention import Attend, sdpa
from engine.parallel.collectives import all_gather, all_to_all


class UlyssesSequence:
    """The part of a sequence that one of the group's ranks holds."""

    def __init__(
        self, group: dist.ProcessGroup, attend: Attend = sdpa, cross_attend: Attend | None = None
    ) -> None:
        self.group = group
        self.ranks = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        self.attend = attend
        self.cross_attend = cross_attend or attend

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

    def self_attention(self, q_BlHK: Tensor, k_BlHK: Tensor, v_BlHK: Tensor, length: int) -> Tensor:
        """This rank's tokens' attention over all tokens, [B, l, H, K]."""
        by_rank = torch.unflatten(torch.stack((q_BlHK, k_BlHK, v_BlHK)), 3, (self.ranks, -1)).movedim(3, 1)
        q_uBlhK, k_uBlhK, v_uBlhK = by_rank.unbind(0)
        return self.attend_by_rank(q_uBlhK, k_uBlhK, v_uBlhK, length).view(q_BlHK.shape)

    def attend_by_rank(self, q_uBlhK: Tensor, k_uBlhK: Tensor, v_uBlhK: Tensor, length: int) -> Tensor:
        """The same, [B, l, H * K], from heads grouped by the rank that attends them."""
        q_BLhK, k_BLhK, v_BLhK = (self._tokens_for_heads(x) for x in (q_uBlhK, k_uBlhK, v_uBlhK))
        o_BLhK = self.attend(q_BLhK, k_BLhK[:, :length], v_BLhK[:, :length])
        return self._heads_for_tokens(o_BLhK)

    def cross_attention(self, q_BLHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor) -> Tensor:
        """Plain attention: every rank holds the whole text."""
        return self.cross_attend(q_BLHK, k_BTHK, v_BTHK)

    def _tokens_for_heads(self, sent_uBlhK: Tensor) -> Tensor:
        """[B, L, h, K]: give away the other ranks' heads, receive their tokens."""
        return all_to_all(sent_uBlhK, self.group).movedim(0, 1).flatten(1, 2)

    def _heads_for_tokens(self, o_BLhK: Tensor) -> Tensor:
        """[B, l, H * K]: the way back."""
        sent_uBlhK = torch.unflatten(o_BLhK, 1, (self.ranks, -1)).movedim(1, 0)
        return all_to_all(sent_uBlhK, self.group).permute(1, 2, 0, 3, 4).flatten(2)

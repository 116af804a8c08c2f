"""The order in which q, k and v leave for the ranks that attend with them.

Shapes: B batch, L tokens here, H heads, K head dimension, R ranks, G heads of a rank in one group.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SendLayout:
    """A buffer as one [B, R, L, G, K] after another, one for each group of heads.

    Group after group, each rank gets the next G heads: the heads of a group are consecutive over the ranks,
    so that a group's part of the output projection is a slice of its columns. One rank and one group is
    the plain [B, L, H, K].
    """

    ranks: int = 1
    groups: tuple[int, ...] = ()  # heads of one rank in each group, at most two groups

    @staticmethod
    def of(heads: int, ranks: int = 1, groups: int = 1) -> "SendLayout":
        """Heads shared out evenly over ranks, a rank's share split into `groups` as evenly as it goes."""
        share = heads // ranks
        if heads % ranks or not 1 <= groups <= 2:
            raise ValueError(f"{heads} heads in {groups} groups over {ranks} ranks: expected 1 or 2 groups "
                             "and a number of heads that the ranks divide")  # fmt: skip
        groups = min(groups, share)
        return SendLayout(ranks, tuple((share + groups - 1 - i) // groups for i in range(groups)))

    @property
    def heads(self) -> int:
        """Of all ranks."""
        return self.ranks * sum(self.groups)

    def first(self, group: int) -> int:
        """The first head of a group."""
        return self.ranks * sum(self.groups[:group])

    def parts(self, sent: Tensor, batch: int, tokens: int) -> list[Tensor]:
        """A buffer in this layout as one [B, R, L, G, K] a group: views."""
        flat = sent.view(-1)
        head = flat.numel() // (batch * tokens * self.heads)
        views, at = [], 0
        for heads in self.groups:
            size = batch * self.ranks * tokens * heads * head
            views.append(flat[at : at + size].view(batch, self.ranks, tokens, heads, head))
            at += size
        return views

    def slices(self, x_BLHK: Tensor) -> list[Tensor]:
        """The same parts, [B, R, L, G, K] each, of a tensor that lies token by token: views."""
        parts = []
        for group, heads in enumerate(self.groups):
            x = x_BLHK[:, :, self.first(group) : self.first(group) + self.ranks * heads]
            parts.append(torch.unflatten(x, 2, (self.ranks, heads)).permute(0, 2, 1, 3, 4))
        return parts

    def pack(self, x_BLHK: Tensor) -> Tensor:
        """[B, L, H, K] written in this layout; the same tensor where that is how it lies."""
        if self.ranks == 1 and len(self.groups) == 1:
            return x_BLHK.contiguous()
        sent = x_BLHK.new_empty(x_BLHK.shape)
        batch, tokens = x_BLHK.shape[:2]
        for part, source in zip(self.parts(sent, batch, tokens), self.slices(x_BLHK), strict=True):
            part.copy_(source)
        return sent

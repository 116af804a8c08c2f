"""A guided prediction as the official code makes it on several GPUs: the baseline of a node's ratio.

Written from the order of operations of the official `wan/distributed/ulysses.py` and `sequence_parallel.py`
(Wan-Video/Wan2.2, Apache-2.0): one pass after another; q, k and v are exchanged by all-to-all, then the
output, and nothing is computed meanwhile; the prediction is gathered at the end. The blocks are
`OfficialBlock`s over the engine's own weights. What the official code also spends is left out, so ratios
are the smaller for it: its gathers of sharded weights, text keys and values in every step, and the time
projection of every token (here of one, then repeated).

Shapes: L tokens of this rank, R ranks, H heads, K head dimension, D model width.
"""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from benchmarks._official import Attend, OfficialBlock, complex_rope
from engine.dit import DiT
from engine.dit_block import Block, TextKV
from engine.parallel.collectives import all_gather


class OfficialStep:
    """One expert's guided prediction over the ranks of `group` (None: this rank alone)."""

    def __init__(
        self,
        expert: DiT,
        grid: tuple[int, int, int],
        attend: Attend,
        device: torch.device,
        group: dist.ProcessGroup | None,
    ) -> None:
        self.expert, self.grid, self.group, self._attend = expert, grid, group, attend
        self.ranks = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        self.length = math.prod(grid)
        self.tokens = -(-self.length // self.ranks)
        head = expert.config.head_dim
        factors = complex_rope(grid, head, self.length, device)
        factors = F.pad(torch.view_as_real(factors), (0, 0, 0, 0, 0, 0, 0, self._padding))
        factors = torch.view_as_complex(self._mine(factors, 0).contiguous())
        self.blocks = [
            OfficialBlock(block, self.attention, attend, factors, self.length)
            for block in expert.blocks
            if isinstance(block, Block)
        ]

    @property
    def _padding(self) -> int:
        return self.tokens * self.ranks - self.length

    def _mine(self, x: Tensor, dim: int) -> Tensor:
        return x.narrow(dim, self.rank * self.tokens, self.tokens)

    def __call__(self, latents_CFHW: Tensor, t: int, texts: TextKV, guide: float) -> Tensor:
        """The guided flow [C, F, H, W] fp32; `texts` are both prompts' keys and values, [2, T, H, K]."""
        passes = [
            self.flow(latents_CFHW, t, [(k[row : row + 1], v[row : row + 1]) for k, v in texts])
            for row in (0, 1)
        ]
        return passes[1] + guide * (passes[0] - passes[1])

    def flow(self, latents_CFHW: Tensor, t: int, text: TextKV) -> Tensor:
        """One pass."""
        expert = self.expert
        x_BLD = expert.embed_patches(expert.patchify(latents_CFHW[None]))
        x_BLD = self._mine(F.pad(x_BLD, (0, 0, 0, self._padding)), 1).contiguous()
        time_BSD, e_BS6D = expert.embed_time(torch.tensor([[t]], device=latents_CFHW.device))
        e_1L6D = e_BS6D.expand(1, self.tokens, 6, -1).contiguous()
        for block, text_kv in zip(self.blocks, text, strict=True):
            x_BLD = block(x_BLD, e_1L6D, text_kv)
        patches_BLP = expert.head(x_BLD, time_BSD, 0)
        if self.group is not None:
            patches_BLP = all_gather(patches_BLP, self.group).transpose(0, 1).flatten(1, 2)
        flow: Tensor = expert.unpatchify(patches_BLP[:, : self.length], self.grid)[0]
        return flow

    def attention(self, q: Tensor, k: Tensor, v: Tensor, length: int) -> Tensor:
        """[1, L, H, K] to [1, L, H, K]: heads for tokens and back around attention."""
        if self.group is None:
            return self._attend(q, k[:, :length], v[:, :length])
        q, k, v = (self._to_heads(x) for x in (q, k, v))
        return self._to_tokens(self._attend(q, k[:, :length].contiguous(), v[:, :length].contiguous()))

    def _to_heads(self, x_1LHK: Tensor) -> Tensor:
        _, tokens, heads, width = x_1LHK.shape
        parts = x_1LHK.view(tokens, self.ranks, heads // self.ranks, width).transpose(0, 1).contiguous()
        return self._exchange(parts).view(1, self.ranks * tokens, heads // self.ranks, width)

    def _to_tokens(self, o: Tensor) -> Tensor:
        _, _, heads, width = o.shape
        parts = self._exchange(o.reshape(self.ranks, self.tokens, heads, width).contiguous())
        return parts.transpose(0, 1).reshape(1, self.tokens, self.ranks * heads, width)

    def _exchange(self, parts: Tensor) -> Tensor:
        out = torch.empty_like(parts)
        dist.all_to_all_single(out, parts, group=self.group)
        return out

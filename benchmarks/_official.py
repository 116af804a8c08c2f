"""One transformer block as the official code computes it, in plain torch: the baseline of every ratio.

Written from the formulas and the order of operations of the official `wan/modules/model.py` and
`wan/distributed/sequence_parallel.py` (Wan-Video/Wan2.2, Apache-2.0): an fp32 residual stream, modulation
kept per token in fp32, casts by autocast before each product, norms and GELU as separate passes, RoPE in
fp64 complex numbers, q, k and v in products of their own. Weights are the engine's own block's.

Shapes: L tokens here, D model width, H heads, K head dimension.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.dit_block import Block
from engine.rope import axis_dims

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
AttendAll = Callable[[Tensor, Tensor, Tensor, int], Tensor]  # and how many keys are real


def complex_rope(grid: tuple[int, int, int], head: int, tokens: int, device: torch.device) -> Tensor:
    """[tokens, 1, K/2] complex128: the official factors of this rank's first tokens."""
    parts = []
    for axis, (size, dim) in enumerate(zip(grid, axis_dims(head), strict=True)):
        rate = 10_000.0 ** -(torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim)
        angle = torch.outer(torch.arange(size, dtype=torch.float64, device=device), rate)
        view = [1, 1, 1, dim // 2]
        view[axis] = size
        parts.append(torch.polar(torch.ones_like(angle), angle).view(view).expand(*grid, dim // 2))
    return torch.cat(parts, dim=-1).reshape(-1, 1, head // 2)[:tokens].contiguous()


def rotate(x_1LHK: Tensor, factors: Tensor) -> Tensor:
    """RoPE as the official code does it: fp64 complex products, fp32 out."""
    x = torch.view_as_complex(x_1LHK[0].to(torch.float64).reshape(*x_1LHK.shape[1:3], -1, 2))
    return torch.stack([torch.view_as_real(x * factors).flatten(2)]).float()


def official_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The official RMSNorm: fp32 inside, back to x's dtype, then times the weight."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + eps)).type_as(x) * weight


class OfficialBlock:
    """The official forward of one block, over another block's weights."""

    def __init__(
        self, block: Block, attend: AttendAll, cross_attend: Attend, factors: Tensor, length: int
    ) -> None:
        self.block, self.attend, self.cross_attend, self.factors = block, attend, cross_attend, factors
        self.length = length  # of the whole sequence
        dtype = block.self_attn.q.weight.dtype
        attn, cross = block.self_attn, block.cross_attn
        # The official weights are all of one dtype.
        self.norm_q, self.norm_k, self.norm_cross, self.modulation, self.norm3 = (
            t.detach().to(dtype)
            for t in (
                attn.norm_q.weight,
                attn.norm_k.weight,
                cross.norm_q.weight,
                block.modulation,
                torch.stack((block.norm3.weight, block.norm3.bias)),
            )
        )

    def __call__(self, x: Tensor, e_1L6D: Tensor, text: tuple[Tensor, Tensor]) -> Tensor:
        """x [1, L, D] fp32, e [1, L, 6, D] fp32 -> x."""
        device = x.device.type
        with torch.autocast(device, dtype=torch.bfloat16):
            with torch.autocast(device, enabled=False):
                e = (self.modulation.unsqueeze(0).float() + e_1L6D).chunk(6, dim=2)
            y = F.layer_norm(x.float(), x.shape[-1:], eps=self.block.eps).type_as(x).float()
            y = self.self_attention(y * (1 + e[1].squeeze(2)) + e[0].squeeze(2))
            with torch.autocast(device, enabled=False):
                x = x + y.float() * e[2].squeeze(2)
            x = x + self.cross_attention(x, text)
            return self.feed_forward(x, e)

    def self_attention(self, y: Tensor) -> Tensor:
        """Three products, norms, RoPE in fp64, attention, product."""
        attn, eps = self.block.self_attn, self.block.eps
        q, k, v = attn.q(y), attn.k(y), attn.v(y)
        shape = (*y.shape[:2], attn.heads, -1)
        q = official_norm(q, self.norm_q, eps).view(shape)
        k = official_norm(k, self.norm_k, eps).view(shape)
        q, k, v = rotate(q, self.factors).bfloat16(), rotate(k, self.factors).bfloat16(), v.view(shape)
        o = self.attend(q, k, v, self.length).flatten(2)
        return attn.o(o)

    def cross_attention(self, x: Tensor, text: tuple[Tensor, Tensor]) -> Tensor:
        """Over text keys and values that are given (their products are small)."""
        cross, eps = self.block.cross_attn, self.block.eps
        weight, bias = self.norm3.float()
        y = F.layer_norm(x.float(), x.shape[-1:], weight, bias, eps).type_as(x)
        q = cross.q(y)
        q = official_norm(q, self.norm_cross, eps).view(*x.shape[:2], cross.heads, -1)
        o = self.cross_attend(q.bfloat16(), *text).flatten(2)
        return cross.o(o)

    def feed_forward(self, x: Tensor, e: tuple[Tensor, ...]) -> Tensor:
        """Norm, modulation, product, GELU, product, gate."""
        y = F.layer_norm(x.float(), x.shape[-1:], eps=self.block.eps).type_as(x).float()
        y = y * (1 + e[4].squeeze(2)) + e[3].squeeze(2)
        y = self.block.ffn[0](y)
        y = F.gelu(y, approximate="tanh")
        y = self.block.ffn[2](y)
        with torch.autocast(x.device.type, enabled=False):
            return x + y.float() * e[5].squeeze(2)

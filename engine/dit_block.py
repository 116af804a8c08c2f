"""One block of the diffusion transformer, as the maths reads; `engine.dit` stacks them.

Shapes and facts: as in `engine.dit`.
"""

from collections.abc import Generator
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine import fused, ops
from engine.attention import Sequence
from engine.config import DiTConfig
from engine.kept_attention import KeptAttention, attend

TextKV = list[tuple[Tensor, Tensor]]  # one (k, v) a block, each [B, T, N, K]


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """`layer(x)` with x in the dtype of the layer's weight."""
    assert isinstance(layer, nn.Linear)
    return F.linear(x.to(layer.weight.dtype), layer.weight, layer.bias)


class RMSNorm(nn.Module):
    """The weight of a norm over the full width, shared out over the heads afterwards."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x_BLD: Tensor) -> Tensor:
        """RMSNorm in fp32."""
        return ops.rms_norm(x_BLD, self.weight, self.eps)


class Attention(nn.Module):
    """The projections of one attention layer; the same parameters for self- and cross-attention."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.q = nn.Linear(config.dim, config.dim)
        self.k = nn.Linear(config.dim, config.dim)
        self.v = nn.Linear(config.dim, config.dim)
        self.o = nn.Linear(config.dim, config.dim)
        self.norm_q = RMSNorm(config.dim, config.eps)
        self.norm_k = RMSNorm(config.dim, config.eps)

    def split_heads(self, x_BLD: Tensor) -> Tensor:
        """[B, L, D] as [B, L, N, K]."""
        return torch.unflatten(x_BLD, -1, (self.heads, -1))


class SelfAttention(Attention):
    """Every token attends to every token; positions enter by RoPE."""

    def forward(self, y_BLD: Tensor, rope: tuple[Tensor, Tensor], sequence: Sequence, length: int) -> Tensor:
        """Output projection of attention over the whole sequence, [B, L, D]."""
        v_BLNK = self.split_heads(linear(self.v, y_BLD))
        q_BLNK = ops.apply_rope(self.split_heads(self.norm_q(linear(self.q, y_BLD))), *rope)
        k_BLNK = ops.apply_rope(self.split_heads(self.norm_k(linear(self.k, y_BLD))), *rope)
        o_BLNK = sequence.self_attention(q_BLNK.to(v_BLNK.dtype), k_BLNK.to(v_BLNK.dtype), v_BLNK, length)
        return linear(self.o, o_BLNK.flatten(2))


class CrossAttention(Attention):
    """Tokens attend to the text, whose keys and values are computed once a request."""

    def keys_values(self, text_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """(k, v) of the text, [B, T, N, K] each."""
        v_BTNK = self.split_heads(linear(self.v, text_BTD))
        k_BTNK = self.split_heads(self.norm_k(linear(self.k, text_BTD)))
        return k_BTNK.to(v_BTNK.dtype), v_BTNK

    def forward(self, y_BLD: Tensor, text_kv: tuple[Tensor, Tensor], sequence: Sequence) -> Tensor:
        """Output projection of attention over the text, [B, L, D]; B is the text's where y's is 1."""
        k_BTNK, v_BTNK = text_kv
        q_BLNK = self.split_heads(self.norm_q(linear(self.q, y_BLD))).to(v_BTNK.dtype)
        q_BLNK = q_BLNK.expand(v_BTNK.shape[0], -1, -1, -1)
        return linear(self.o, sequence.cross_attention(q_BLNK, k_BTNK, v_BTNK).flatten(2))


class Numbers(Protocol):
    """What may run a block instead of its own formulas, in other numbers; see `engine.eight_bit`."""

    def run(
        self,
        block: "Block",
        stream: fused.Stream,
        e_BS6D: Tensor,
        split: int,
        rope: tuple[Tensor, Tensor],
        text_kv: tuple[Tensor, Tensor],
        sequence: Sequence,
        length: int,
        lane: int,
    ) -> Generator[None, None, None]:
        """As `engine.fused.run_block`."""
        ...


class Block(nn.Module):
    """Self-attention, cross-attention, feed-forward, each added to the fp32 residual stream."""

    eight: Numbers | None = None  # set while the block computes in 8 bits
    kept: KeptAttention | None = None  # set while its self-attention is kept or reused

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.self_attn = SelfAttention(config)
        self.norm3 = nn.LayerNorm(config.dim, config.eps)
        self.cross_attn = CrossAttention(config)
        self.ffn = nn.Sequential(
            nn.Linear(config.dim, config.ffn_dim),
            nn.GELU(approximate="tanh"),
            nn.Linear(config.ffn_dim, config.dim),
        )
        self.modulation = nn.Parameter(torch.randn(1, 6, config.dim) / config.dim**0.5)

    def forward(
        self,
        x_BLD: Tensor,
        e_BS6D: Tensor,
        split: int,
        rope: tuple[Tensor, Tensor],
        text_kv: tuple[Tensor, Tensor],
        sequence: Sequence,
        length: int,
    ) -> Tensor:
        """One block of the residual stream."""
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (self.modulation.float() + e_BS6D).unbind(2)
        y_BLD = ops.modulated_norm(x_BLD, shift, scale, split, self.eps)
        o_BLD = attend(self, x_BLD.shape[0], lambda: self.self_attn(y_BLD, rope, sequence, length))
        x_BLD = ops.add_gated(x_BLD, o_BLD, gate, split)
        x_BLD = x_BLD + self.cross_attn(self.norm3(x_BLD), text_kv, sequence).float()
        y_BLD = ops.modulated_norm(x_BLD, ffn_shift, ffn_scale, split, self.eps)
        y_BLD = linear(self.ffn[2], F.gelu(linear(self.ffn[0], y_BLD), approximate="tanh"))
        return ops.add_gated(x_BLD, y_BLD, ffn_gate, split)

"""The block's contestants: official, compiled, ours, and the floor that today's libraries set.

All share one block's weights and compute one GPU's share: `tokens` local tokens for everything but
self-attention, and `heads / share` heads over the whole sequence in self-attention. What the all-to-all
would bring is a fixed random tensor of the right shape, the same for every contestant.

Shapes: L tokens here, D model width, H heads, K head dimension, G heads in self-attention, R ranks.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks._measure import Step
from benchmarks._official import OfficialBlock, complex_rope
from engine import fused
from engine.attention import QKV, Overlap
from engine.config import DiTConfig
from engine.dit_block import Block
from engine.rope import rope_table
from kernels import gemm
from kernels.attention import choose
from kernels.attention.backends import BACKENDS
from kernels.qk_norm_rope import SendLayout

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
CONFIGS = {
    "A14B": DiTConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40),
    "5B": DiTConfig(dim=3072, ffn_dim=14336, num_heads=24, num_layers=30, in_channels=48, out_channels=48),
    # For rehearsals on a CPU alone.
    "small": DiTConfig(dim=128, ffn_dim=192, num_heads=8, num_layers=2, text_dim=32, text_len=7),
}
GRIDS = {
    ("A14B", "720p"): (21, 45, 80),
    ("A14B", "480p"): (21, 30, 52),
    ("5B", "720p"): (31, 22, 40),
    ("A14B", "check"): (3, 20, 25),
    ("5B", "check"): (3, 20, 25),
    ("small", "720p"): (3, 4, 6),
    ("small", "check"): (2, 3, 4),
}


@dataclass(frozen=True)
class Share:
    """One GPU's part of a block."""

    model: str
    size: str
    share: int  # GPUs that the sequence is split over

    @property
    def config(self) -> DiTConfig:
        """The model's shape."""
        return CONFIGS[self.model]

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tokens along frames, rows and columns."""
        return GRIDS[self.model, self.size]

    @property
    def total(self) -> int:
        """Tokens of the video."""
        frames, rows, columns = self.grid
        return frames * rows * columns

    @property
    def tokens(self) -> int:
        """Tokens here, padding included."""
        return -(-self.total // self.share)

    @property
    def heads(self) -> int:
        """Heads that this GPU's self-attention works on."""
        return self.config.num_heads // self.share


def library(name: str) -> Attend:
    """A named attention backend with its own settings."""
    return lambda q, k, v: BACKENDS[name](q, k, v, {})


class ShareSequence:
    """Stands for the rank's place among `share` ranks: attention runs on what the others would send.

    Of an `engine.attention.Sequence` it has what a block asks for. q, k and v are projected in one product,
    as the engine does where two guidance passes hide each other's transfers.
    """

    overlap = Overlap(split_qkv=False, interleave=False)

    def __init__(self, inputs: "Inputs", attend: Attend, cross_attend: Attend) -> None:
        self.inputs, self.attend, self.cross = inputs, attend, cross_attend
        self.ranks = inputs.share.share

    def begin(self, shape: tuple[int, int, int, int], like: Tensor, lane: int = 0) -> "ShareRun":
        """A self-attention of the engine's fused block."""
        return ShareRun(self, shape)

    def attend_by_rank(self, q: Tensor, k: Tensor, v: Tensor, length: int) -> Tensor:
        """[1, L, D] of attention's output; with one rank over q, k, v themselves."""
        if self.ranks > 1:
            q, k, v = self.inputs.received
        return self.attend(q, k[:, :length], v[:, :length]).reshape(1, self.inputs.share.tokens, -1)

    def self_attention(self, q: Tensor, k: Tensor, v: Tensor, length: int) -> Tensor:
        """The same for the plain blocks' layout, [1, L, H, K]."""
        return self.attend_by_rank(q, k, v, length).view(q.shape)

    def cross_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention over the text."""
        return self.cross(q, k, v)


class ShareRun:
    """See `engine.attention.AttentionRun`: what is sent stays here, what would come is there already."""

    def __init__(self, sequence: ShareSequence, shape: tuple[int, int, int, int]) -> None:
        self.layout = SendLayout.of(shape[2], sequence.ranks)
        self._sequence, self._shape = sequence, shape
        self._sent: dict[QKV, Tensor] = {}

    def send(self, name: QKV, x: Tensor, packed: bool = True) -> None:
        """Keep it."""
        self._sent[name] = x.view(self._shape)

    def attend(self, length: int) -> None:
        """Over the other ranks' tokens, or with one rank over its own."""
        q, k, v = (self._sent.pop(name) for name in ("q", "k", "v"))
        self._out = self._sequence.attend_by_rank(q, k, v, length)

    def outputs(self) -> Iterator[tuple[slice, Tensor]]:
        """All of it."""
        yield slice(0, self._shape[2] * self._shape[3]), self._out


class Inputs:
    """Random weights and activations of one share, bf16 with an fp32 residual."""

    def __init__(self, share: Share, seed: int = 0, device: str = "cuda") -> None:
        torch.manual_seed(seed)
        config = share.config
        self.share, self.device = share, torch.device(device)
        with self.device:
            self.block = Block(config).to(torch.bfloat16).requires_grad_(False)
            for module in (self.block.norm3, self.block.self_attn.norm_q, self.block.self_attn.norm_k):
                module.float()
            self.block.cross_attn.norm_q.float()
            self.block.modulation.data = self.block.modulation.data.float()
            head = config.head_dim
            self.x = torch.randn(1, share.tokens, config.dim)
            self.e = torch.randn(1, 1, 6, config.dim) * 0.3
            text = torch.randn(2, 1, config.text_len, config.num_heads, head).bfloat16()
            self.text = (text[0], text[1])
            received = torch.randn(3, 1, share.tokens * share.share, share.heads, head).bfloat16()
            self.received = (received[0], received[1], received[2])
        cos, sin = rope_table(share.grid, head, self.device)
        self.rope = (cos[: share.tokens].contiguous(), sin[: share.tokens].contiguous())


def official(inputs: Inputs, attend: Attend) -> Step:
    """The official computation with the given attention for both kinds, as its code has it."""
    share = inputs.share
    factors = complex_rope(share.grid, share.config.head_dim, share.tokens, inputs.device)
    sequence = ShareSequence(inputs, attend, attend)
    block = OfficialBlock(inputs.block, sequence.self_attention, attend, factors, share.total)
    e_1L6D = inputs.e.expand(1, share.tokens, 6, -1).contiguous()
    return lambda: block(inputs.x, e_1L6D, inputs.text)


def own_sequence(inputs: Inputs) -> ShareSequence:
    """The share with the attention that the engine would choose."""
    dtype, head, device = torch.bfloat16, inputs.share.config.head_dim, inputs.device
    return ShareSequence(inputs, choose("self", dtype, head, device), choose("cross", dtype, head, device))


def run_fused(inputs: Inputs, stream: fused.Stream, sequence: ShareSequence) -> None:
    """The engine's fused block on the stream, to its end (it stops where data would be on its way)."""
    total = inputs.share.total
    block = fused.run_block(
        inputs.block,
        stream,
        inputs.e,
        0,
        inputs.rope,
        inputs.text,
        sequence,
        total,  # type: ignore[arg-type]
    )
    fused.take_turns([block])


def ours(inputs: Inputs) -> Step:
    """The engine's own fused block, between two others: it takes a pending branch and leaves one."""
    sequence = own_sequence(inputs)
    gate = inputs.e[:, :, 5].contiguous()
    branch = torch.randn_like(inputs.x).bfloat16()

    def step() -> Tensor:
        stream = fused.Stream(inputs.x)
        stream.add(branch, gate)
        run_fused(inputs, stream, sequence)
        assert stream.pending is not None
        return stream.pending

    return step


def compiled(inputs: Inputs, attend: Attend, cross_attend: Attend) -> Step:
    """Plain torch with the exact rewrites, its pieces between products and attention under torch.compile."""
    block, config = inputs.block, inputs.share.config
    heads, eps, dim = config.num_heads, config.eps, config.dim
    sequence = ShareSequence(inputs, attend, cross_attend)
    qkv_weight, qkv_bias = fused.packed_qkv(block.self_attn)
    ranks = inputs.share.share

    @torch.compile
    def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return (F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift).bfloat16()

    @torch.compile
    def rotated(qkv: Tensor, weight_q: Tensor, weight_k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        parts = []
        for x, weight in ((qkv[..., :dim], weight_q), (qkv[..., dim : 2 * dim], weight_k)):
            x = x.float()
            x = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight
            even, odd = x.view(*x.shape[:-1], heads, -1, 2).unbind(-1)
            c, s = cos[:, None, :], sin[:, None, :]
            x = torch.stack((even * c - odd * s, even * s + odd * c), dim=-1)
            parts.append(x.view(1, -1, ranks, heads // ranks, config.head_dim).bfloat16())
        parts.append(qkv[..., 2 * dim :].view(1, -1, ranks, heads // ranks, config.head_dim))
        # One rank's q, k and v are [1, L, H, K]; for more they lie rank by rank, as they are sent.
        return torch.stack([x[:, :, 0] if ranks == 1 else x.permute(2, 0, 1, 3, 4) for x in parts])

    @torch.compile
    def joined(x: Tensor, y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        x = x + y.float() * gate
        return x, F.layer_norm(x, x.shape[-1:], weight, bias, eps).bfloat16()

    @torch.compile
    def joined_modulated(x: Tensor, y: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        x = x + y.float()
        return x, (F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift).bfloat16()

    @torch.compile
    def normed(q: Tensor, weight: Tensor) -> Tensor:
        q = q.float()
        return (q * (q.square().mean(-1, keepdim=True) + eps).rsqrt() * weight).bfloat16()

    @torch.compile
    def activated(x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh")

    @torch.compile
    def gated(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
        return x + y.float() * gate

    def step() -> Tensor:
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (block.modulation + inputs.e).unbind(2)
        qkv = F.linear(modulated(inputs.x, shift, scale), qkv_weight, qkv_bias)
        q, k, v = rotated(qkv, block.self_attn.norm_q.weight, block.self_attn.norm_k.weight, *inputs.rope)
        o = block.self_attn.o(sequence.attend_by_rank(q, k, v, inputs.share.total))
        x, y = joined(inputs.x, o, gate, block.norm3.weight, block.norm3.bias)
        q = normed(block.cross_attn.q(y), block.cross_attn.norm_q.weight).view(1, -1, heads, config.head_dim)
        o = block.cross_attn.o(sequence.cross_attention(q, *inputs.text).flatten(2))
        x, y = joined_modulated(x, o, ffn_shift, ffn_scale)
        y = block.ffn[2](activated(block.ffn[0](y)))
        return gated(x, y, ffn_gate)

    return step


def floor(inputs: Inputs, attend: Attend, cross_attend: Attend) -> Step:
    """What no block on these libraries goes below: its products, its attention, and the bytes of its passes.

    The passes are stood for by copies of as many bytes: three joins of the fp32 residual (12 bytes a
    feature each), the q, k, v pass (4 bytes of three features) and the cross query's norm (4 bytes).
    """
    block, share = inputs.block, inputs.share
    tokens, dim, ffn = share.tokens, share.config.dim, share.config.ffn_dim
    weight, bias = fused.packed_qkv(block.self_attn)
    up = block.ffn[0]
    down = block.ffn[2]
    y, hidden = (torch.randn(1, tokens, n, device=inputs.device).bfloat16() for n in (dim, ffn))
    query = torch.randn(1, tokens, share.config.num_heads, share.config.head_dim, device=inputs.device)
    query = query.bfloat16()
    moved = tokens * dim * (3 * 12 + 3 * 4 + 4)
    source = torch.randint(256, (moved // 2,), dtype=torch.uint8, device=inputs.device)
    target = torch.empty_like(source)
    sequence = ShareSequence(inputs, attend, cross_attend)
    shape = (1, tokens, share.config.num_heads, share.config.head_dim)
    own = tuple(torch.randn(3, *shape, device=inputs.device).bfloat16()) if share.share == 1 else ()

    def step() -> Tensor:
        gemm.reference.linear(y, weight, bias)
        block.self_attn.o(y)
        block.cross_attn.q(y)
        block.cross_attn.o(y)
        gemm.reference.linear(y, up.weight, up.bias)
        gemm.reference.linear(hidden, down.weight, down.bias)
        sequence.attend(*(own or inputs.received))
        cross_attend(query, *inputs.text)
        target.copy_(source)
        return target

    return step

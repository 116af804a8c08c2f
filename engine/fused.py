"""The blocks on fused kernels: the same formulas as `engine.dit.Block`, fewer passes over memory.

What is fused: each branch's joining of the fp32 residual with the norm of the next branch (so the last
branch of a block stays pending until the next block or the head); q, k and v in one product; RMSNorm, RoPE
and the all-to-all's layout in one pass; GELU in its product's epilogue. Nothing else differs: every value
is rounded to the weights' dtype where the plain path rounds it.

Shapes: B batch, L tokens here, D model width, S timestep sets, R ranks of the sequence, G heads of a rank,
K head dimension.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import gemm
from kernels.norm_modulate import Norm, add_normalize, normalize
from kernels.qk_norm_rope import qk_norm_rope, rms_norm

if TYPE_CHECKING:
    from engine.attention import Sequence
    from engine.dit import Block, CrossAttention, Head, SelfAttention, TextKV

HALF = (torch.bfloat16, torch.float16)


def applies(weight: Tensor) -> bool:
    """Whether blocks with such weights run fused: half precision on CUDA, and no gradients wanted.

    So do those without memory (the meta device), by which `engine.memory` plans a GPU's.
    """
    return (weight.is_cuda or weight.is_meta) and weight.dtype in HALF and not torch.is_grad_enabled()


def packed_qkv(attention: "SelfAttention") -> tuple[Tensor, Tensor]:
    """One weight [3 D, D] and bias [3 D] for q, k and v. The three layers' own become views of them.

    So no memory is spent twice, checkpoints keep their names, and an update in place reaches both. Weights
    that were replaced since (moved, loaded anew) are packed again. Weights that are `gathered` for this
    one use (sharded over ranks) are joined each time instead.
    """
    layers = (attention.q, attention.k, attention.v)
    if getattr(attention, "gathered", False):
        return torch.cat([layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers])
    packed: tuple[Tensor, Tensor] | None = getattr(attention, "packed", None)
    if packed is None or any(
        layer.weight.data_ptr() != part.data_ptr()
        for layer, part in zip(layers, packed[0].chunk(3), strict=True)
    ):
        # Never inference tensors, so that training can use the same model afterwards.
        with torch.inference_mode(False), torch.no_grad():
            packed = (
                torch.cat([layer.weight.detach() for layer in layers]),
                torch.cat([layer.bias.detach() for layer in layers]),
            )
            for layer, weight, bias in zip(layers, packed[0].chunk(3), packed[1].chunk(3), strict=True):
                layer.weight.data, layer.bias.data = weight, bias
        attention.packed = packed  # type: ignore[assignment]
    return packed


def _product(layer: nn.Module, x_BLD: Tensor) -> Tensor:
    assert isinstance(layer, nn.Linear)
    return gemm.linear(x_BLD, layer.weight, layer.bias)


def self_attention(
    layer: "SelfAttention", y_BLD: Tensor, rope: tuple[Tensor, Tensor], sequence: "Sequence", length: int
) -> Tensor:
    """Output projection of attention over the whole sequence, [B, L, D]."""
    qkv_BLD = gemm.linear(y_BLD, *packed_qkv(layer))
    q_RBLGK, k_RBLGK, v_RBLGK = qk_norm_rope(
        qkv_BLD, layer.norm_q.weight, layer.norm_k.weight, rope, layer.heads, sequence.ranks, layer.norm_q.eps
    )
    return _product(layer.o, sequence.attend_by_rank(q_RBLGK, k_RBLGK, v_RBLGK, length))


def cross_attention(
    layer: "CrossAttention", y_BLD: Tensor, text_kv: tuple[Tensor, Tensor], sequence: "Sequence"
) -> Tensor:
    """Output projection of attention over the text, [B, L, D]; B is the text's where y's is 1."""
    k_BTNK, v_BTNK = text_kv
    q_BLD = rms_norm(_product(layer.q, y_BLD), layer.norm_q.weight, layer.norm_q.eps)
    q_BLNK = layer.split_heads(q_BLD).expand(v_BTNK.shape[0], -1, -1, -1)
    return _product(layer.o, sequence.cross_attention(q_BLNK, k_BTNK, v_BTNK).flatten(2))


class Stream:
    """The fp32 residual stream and the branch that has not joined it yet."""

    def __init__(self, x_BLD: Tensor) -> None:
        self.x_BLD = x_BLD
        self.pending: Tensor | None = None
        self._gate: Tensor | None = None

    def add(self, y_BLD: Tensor, gate_BSD: Tensor | None) -> None:
        """x += y * gate, done when the stream is read next."""
        assert self.pending is None, "a branch is still pending"
        self.pending, self._gate = y_BLD, gate_BSD

    def read(self, norm: Norm, dtype: torch.dtype) -> Tensor:
        """The stream's normalised copy as `dtype`, after the pending branch joined it."""
        if self.pending is None:
            return normalize(self.x_BLD, norm, dtype)
        self.x_BLD, y_BLD = add_normalize(self.x_BLD, self.pending, self._gate, norm, dtype)
        self.pending = self._gate = None
        return y_BLD


def run_block(
    block: "Block",
    stream: Stream,
    e_BS6D: Tensor,
    split: int,
    rope: tuple[Tensor, Tensor],
    text_kv: tuple[Tensor, Tensor],
    sequence: "Sequence",
    length: int,
) -> None:
    """One block's three branches; the last is left pending on the stream."""
    dtype = block.self_attn.o.weight.dtype
    vectors_6BSD = (block.modulation.float() + e_BS6D).permute(2, 0, 1, 3).contiguous()
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = vectors_6BSD.unbind(0)
    y_BLD = stream.read(Norm(shift, scale, block.eps, split), dtype)
    stream.add(self_attention(block.self_attn, y_BLD, rope, sequence, length), gate)
    # The gate's split is the norm's: an affine norm has one set of vectors, so it may carry it.
    y_BLD = stream.read(Norm.affine(block.norm3.weight, block.norm3.bias, block.eps, split), dtype)
    stream.add(cross_attention(block.cross_attn, y_BLD, text_kv, sequence), None)
    y_BLD = stream.read(Norm(ffn_shift, ffn_scale, block.eps, split), dtype)
    up, down = block.ffn[0], block.ffn[2]
    assert isinstance(up, nn.Linear)
    stream.add(_product(down, gemm.linear_gelu(y_BLD, up.weight, up.bias)), ffn_gate)


def head(module: "Head", stream: Stream, time_BSD: Tensor, split: int) -> Tensor:
    """The head's patches, [B, L, patch * C_out] fp32, from the stream."""
    shift_BSD, scale_BSD = (module.modulation.float() + time_BSD[:, :, None]).permute(2, 0, 1, 3).unbind(0)
    y_BLD = stream.read(Norm(shift_BSD, scale_BSD, module.eps, split), torch.float32)
    return F.linear(y_BLD.to(module.head.weight.dtype), module.head.weight, module.head.bias)


def run_blocks(
    blocks: "Iterable[Block]",
    x_BLD: Tensor,
    e_BS6D: Tensor,
    split: int,
    rope: tuple[Tensor, Tensor],
    text: "TextKV",
    sequence: "Sequence",
    length: int,
) -> Stream:
    """All blocks; the stream's next read (the head's norm) takes in the last branch."""
    stream = Stream(x_BLD)
    for block, text_kv in zip(blocks, text, strict=True):
        run_block(block, stream, e_BS6D, split, rope, text_kv, sequence, length)
    return stream

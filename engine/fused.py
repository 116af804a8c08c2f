"""The blocks on fused kernels: the same formulas as `engine.dit_block.Block`, fewer passes over memory.

What is fused: each branch's joining of the fp32 residual with the norm of the next branch (so the last
branch of a block stays pending until the next block or the head); q, k and v in one product; RMSNorm, RoPE
and the all-to-all's layout in one pass; GELU in its product's epilogue. Nothing else differs: every value
is rounded to the weights' dtype where the plain path rounds it.

Shapes: B batch, L tokens here, D model width, S timestep sets, k features of some heads; M rows and N columns
of a product.
"""

from collections.abc import Callable, Generator, Iterable
from typing import TYPE_CHECKING, Final, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.kept_attention import attend_in_turns
from kernels import gemm
from kernels.norm_modulate import Norm, add_normalize, normalize
from kernels.norm_modulate.reference import add_gated
from kernels.qk_norm_rope import norm_rope, qk_norm_rope, rms_norm

if TYPE_CHECKING:
    from engine.attention import QKV, AttentionRun, Sequence
    from engine.dit import Head
    from engine.dit_block import Block, CrossAttention, SelfAttention, TextKV

DONE: Final = object()
Copy = TypeVar("Copy")  # of the residual stream: a tensor, or what stands for one in 8 bits
SEND_ORDER: "tuple[QKV, ...]" = ("v", "q", "k")
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
    layer: "SelfAttention",
    y_BLD: Tensor,
    rope: tuple[Tensor, Tensor],
    sequence: "Sequence",
    length: int,
    lane: int = 0,
) -> Generator[None, None, Tensor]:
    """Output projection of attention over the whole sequence, [B, L, D].

    A generator that stops twice where data is on its way, so that another pass may compute meanwhile.
    """
    batch, tokens, dim = y_BLD.shape
    run = sequence.begin((batch, tokens, layer.heads, dim // layer.heads), y_BLD, lane)
    project(layer, y_BLD, rope, run, sequence.overlap.split_qkv)
    yield
    run.attend(length)
    yield
    return output_projection(layer.o, run)


def project(
    layer: "SelfAttention", y_BLD: Tensor, rope: tuple[Tensor, Tensor], run: "AttentionRun", split: bool
) -> None:
    """q, k and v, each sent as soon as it is there: in one product, or with `split` one after another.

    The norms need whole rows of q and k, so v, which has none, goes first.
    """
    norms = {"q": layer.norm_q, "k": layer.norm_k}
    if not split:
        qkv_BLD = gemm.linear(y_BLD, *packed_qkv(layer))
        weights = layer.norm_q.weight, layer.norm_k.weight
        q, k, v = qk_norm_rope(qkv_BLD, *weights, rope, run.layout, layer.norm_q.eps)
        for name, x in zip(SEND_ORDER, (v, q, k), strict=True):
            run.send(name, x)
        return
    if not getattr(layer, "gathered", False):
        packed_qkv(layer)  # the layers' weights stay views of the packed ones
    for name in SEND_ORDER:
        x_BLD = _product(getattr(layer, name), y_BLD)
        norm = norms.get(name)
        if norm is None:
            run.send(name, layer.split_heads(x_BLD), packed=False)
        else:
            run.send(name, norm_rope(x_BLD, norm.weight, rope, run.layout, norm.eps))


def output_projection(layer: nn.Module, run: "AttentionRun") -> Tensor:
    """o W^T + bias; where o arrives in groups of heads, their products are added up in fp32."""
    assert isinstance(layer, nn.Linear)
    total_MN: Tensor | None = None
    for columns, o_BLk in run.outputs():
        if o_BLk.shape[-1] == layer.in_features:
            return _product(layer, o_BLk)
        weight_Nk = layer.weight[:, columns]
        total_MN = gemm.add_product(total_MN, o_BLk.flatten(0, 1), weight_Nk)
        shape = o_BLk.shape[:2]
    assert total_MN is not None, "attention without output"
    return torch.unflatten((total_MN + layer.bias.float()).to(layer.weight.dtype), 0, shape)


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

    def __init__(self, x_BLD: Tensor, pending: Tensor | None = None, gate: Tensor | None = None) -> None:
        self.x_BLD = x_BLD
        self.pending, self._gate = pending, gate

    def add(self, y_BLD: Tensor, gate_BSD: Tensor | None) -> None:
        """x += y * gate, done when the stream is read next."""
        assert self.pending is None, "a branch is still pending"
        self.pending, self._gate = y_BLD, gate_BSD

    def read(self, norm: Norm, dtype: torch.dtype) -> Tensor:
        """The stream's normalised copy as `dtype`, after the pending branch joined it."""
        return self.take(
            lambda x_BLD: normalize(x_BLD, norm, dtype),
            lambda x_BLD, y_BLD, gate_BSD: add_normalize(x_BLD, y_BLD, gate_BSD, norm, dtype),
        )

    def take(
        self,
        plain: Callable[[Tensor], Copy],
        joining: Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Copy]],
    ) -> Copy:
        """What `plain` makes of the stream; where a branch is pending `joining` also gives the new stream."""
        if self.pending is None:
            return plain(self.x_BLD)
        self.x_BLD, copy = joining(self.x_BLD, self.pending, self._gate)
        self.pending = self._gate = None
        return copy

    def joined(self, split: int) -> Tensor:
        """The stream with the pending branch in it, [B, L, D]; stays readable."""
        return self.x_BLD if self.pending is None else add_gated(self.x_BLD, self.pending, self._gate, split)

    def rows(self) -> "list[Stream]":
        """Each batch entry as a stream of its own."""

        def entry(x: Tensor | None, row: int) -> Tensor | None:
            return x if x is None or x.shape[0] == 1 else x[row : row + 1]

        rows = range(self.x_BLD.shape[0])
        return [Stream(self.x_BLD[r : r + 1], entry(self.pending, r), entry(self._gate, r)) for r in rows]

    @staticmethod
    def of_rows(streams: "list[Stream]") -> "Stream":
        """The inverse; all streams have, or none has, a branch pending."""
        x_BLD = torch.cat([stream.x_BLD for stream in streams])
        branches = [stream.pending for stream in streams if stream.pending is not None]
        gates = [stream._gate for stream in streams if stream._gate is not None]
        if not branches:
            return Stream(x_BLD)
        return Stream(x_BLD, torch.cat(branches), torch.cat(gates) if gates else None)


def run_block(
    block: "Block",
    stream: Stream,
    e_BS6D: Tensor,
    split: int,
    rope: tuple[Tensor, Tensor],
    text_kv: tuple[Tensor, Tensor],
    sequence: "Sequence",
    length: int,
    lane: int = 0,
) -> Generator[None, None, None]:
    """One block's three branches; the last is left pending on the stream. Stops as `self_attention` does."""
    if block.eight is not None:
        yield from block.eight.run(block, stream, e_BS6D, split, rope, text_kv, sequence, length, lane)
        return
    dtype = block.self_attn.o.weight.dtype
    vectors_6BSD = (block.modulation.float() + e_BS6D).permute(2, 0, 1, 3).contiguous()
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = vectors_6BSD.unbind(0)
    y_BLD = stream.read(Norm(shift, scale, block.eps, split), dtype)
    attention = self_attention(block.self_attn, y_BLD, rope, sequence, length, lane)
    stream.add((yield from attend_in_turns(block, lane, stream.x_BLD.shape[0], attention)), gate)
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
    """All blocks; the stream's next read (the head's norm) takes in the last branch.

    Where two guidance passes meet on ranks that exchange data, the passes take turns after the first block,
    whose self-attention is the same for both: one computes while the other's data is on its way. So one may
    be a block ahead of the other, which only a list of resident blocks allows.
    """
    stream = Stream(x_BLD)
    if not (sequence.overlap.interleave and text[0][0].shape[0] == 2 and isinstance(blocks, list)):
        for block, text_kv in zip(blocks, text, strict=True):
            take_turns([run_block(block, stream, e_BS6D, split, rope, text_kv, sequence, length)])
        return stream

    def passes(stream: Stream, lane: int, row: slice) -> Generator[None, None, None]:
        texts = [(k[row], v[row]) for k, v in text]
        e = e_BS6D[row] if e_BS6D.shape[0] > 1 else e_BS6D
        for block, text_kv in zip(blocks[1:], texts[1:], strict=True):
            yield from run_block(block, stream, e, split, rope, text_kv, sequence, length, lane)

    take_turns([run_block(blocks[0], stream, e_BS6D, split, rope, text[0], sequence, length)])
    streams = stream.rows()
    take_turns([passes(each, lane, slice(lane, lane + 1)) for lane, each in enumerate(streams)])
    return Stream.of_rows(streams)


def take_turns(passes: list[Generator[None, None, None]]) -> None:
    """Run all to their ends, each up to its next stop in turn."""
    waiting = list(passes)
    while waiting:
        waiting = [one for one in waiting if next(one, DONE) is not DONE]

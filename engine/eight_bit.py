"""A transformer's blocks in 8 or 4 bits: the formulas of `engine.fused.run_block` on quantised operands.

Each norm and the GELU end in the quantisation of the product that follows (a `Format`: `kernels.fp8_gemm` or
`kernels.nvfp4_gemm`), attention may take 8-bit operands (`kernels.attention_8bit`). Text keys and values,
norms, RoPE, the residual stream and what the preset keeps stay as they are.

Weights are quantised once, right after loading, where the memory plan leaves room for both forms; else at
each use, which reads and writes a weight once more a pass. On a node that an operator gives to such presets
(`--weights 8bit`) the loader quantises each block as it arrives, and the published weights are let go.

Shapes: B batch, L tokens here, D model width, S timestep sets.
"""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from engine.attention import Attend, AttentionRun, Sequence
from engine.dit_block import Block
from engine.fused import SEND_ORDER, Stream
from engine.kept_attention import attend_in_turns
from engine.number_format import FORMATS, Format, Operand
from engine.presets import E4M3
from kernels import attention_8bit
from kernels.norm_modulate import Norm
from kernels.qk_norm_rope import norm_rope, qk_norm_rope, rms_norm

PRODUCTS: Final = (
    "self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "cross_attn.q", "cross_attn.o",
    "ffn.0", "ffn.2",
)  # fmt: skip


class Switch:
    """Self-attention that is in 8 bits while `eight` is set, else the plain one."""

    def __init__(self, plain: Attend) -> None:
        self.plain, self.eight = plain, False

    def __call__(self, q_BLHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor) -> Tensor:
        """See `engine.attention.Attend`."""
        return (attention_8bit.attention if self.eight else self.plain)(q_BLHK, k_BTHK, v_BTHK)


@dataclass(frozen=True)
class Weights:
    """One block's quantised matrices; q, k and v as one."""

    qkv: Operand
    o: Operand
    cross_q: Operand
    cross_o: Operand
    up: Operand
    down: Operand

    @staticmethod
    def of(block: Block, numbers: Format[Any] = FORMATS[E4M3]) -> "Weights":
        """Quantised from what the block holds now."""
        q, k, v, *rest = (
            numbers.quantize_weight(block.get_submodule(name).get_parameter("weight").data)
            for name in PRODUCTS
        )
        return Weights(numbers.join((q, k, v)), *rest)


def hold(block: Block) -> Weights:
    """The block's quantised matrices, whose published ones are let go: a [0, 0] of their dtype stays.

    So whatever would compute with those fails by its shape. (The meta device would not do: torch multiplies a
    CPU tensor by a matrix there without complaint, and gives uninitialised memory.)
    """
    weights = Weights.of(block)
    for name in PRODUCTS:
        layer = block.get_submodule(name)
        gone = layer.get_parameter("weight").new_empty(0, 0)
        layer.register_parameter("weight", nn.Parameter(gone, requires_grad=False))
    return weights


class EightBitBlocks:
    """What blocks in one format share: their weights, if those are kept, and the attention's switch."""

    def __init__(self, switch: Switch, keep_weights: bool, form: str = E4M3) -> None:
        self.switch, self.keep_weights, self.numbers = switch, keep_weights, FORMATS[form]
        self.attention = True
        self.held: dict[Block, Weights] = {}  # of blocks that have no others
        self._weights: dict[Block, Weights] = {}
        self._loras: object = ()

    def refresh(self, loras: object) -> None:
        """Forget weights that were quantised with other LoRAs in them."""
        if loras != self._loras:
            self._weights.clear()
            self._loras = loras

    def weights(self, block: Block) -> Weights:
        """The block's quantised matrices."""
        found = self.held.get(block) or self._weights.get(block)
        if found is None:
            found = Weights.of(block, self.numbers)
            if self.keep_weights:
                self._weights[block] = found
        return found

    def run(
        self,
        block: Block,
        stream: Stream,
        e_BS6D: Tensor,
        split: int,
        rope: tuple[Tensor, Tensor],
        text_kv: tuple[Tensor, Tensor],
        sequence: Sequence,
        length: int,
        lane: int,
    ) -> Generator[None, None, None]:
        """One block, as `engine.fused.run_block`: stops twice, and leaves its last branch pending."""
        weights, dtype = self.weights(block), text_kv[1].dtype
        vectors_6BSD = (block.modulation.float() + e_BS6D).permute(2, 0, 1, 3).contiguous()
        shift, scale, gate = vectors_6BSD[:3].unbind(0)
        y = self._read(stream, Norm(shift, scale, block.eps, split))
        attention = self._attention(block, weights, y, rope, sequence, length, lane, dtype)
        del y
        stream.add((yield from attend_in_turns(block, lane, stream.x_BLD.shape[0], attention)), gate)
        self._others(block, weights, stream, vectors_6BSD[3:], split, text_kv, sequence)

    def _attention(
        self,
        block: Block,
        weights: Weights,
        y: Operand,
        rope: tuple[Tensor, Tensor],
        sequence: Sequence,
        length: int,
        lane: int,
        dtype: torch.dtype,
    ) -> Generator[None, None, Tensor]:
        """As `engine.fused.self_attention`."""
        attention = block.self_attn
        (batch, tokens), dim = y.data.shape[:2], y.width
        like = y.data.new_empty(0, dtype=dtype)
        run = sequence.begin((batch, tokens, attention.heads, dim // attention.heads), like, lane)
        self._project(block, weights.qkv, y, rope, run, dtype, sequence.overlap.split_qkv)
        yield
        self.switch.eight = self.attention
        try:
            run.attend(length)
        finally:
            self.switch.eight = False
        yield
        # A row's scale needs the whole row, so parts that arrive one after another are joined first.
        parts = [part for _, part in run.outputs()]
        o_BLD = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return self._product(self.numbers.quantize_rows(o_BLD), weights.o, attention.o, dtype)

    def _others(
        self,
        block: Block,
        weights: Weights,
        stream: Stream,
        ffn_3BSD: Tensor,
        split: int,
        text_kv: tuple[Tensor, Tensor],
        sequence: Sequence,
    ) -> None:
        """The branches after self-attention."""
        dtype = text_kv[1].dtype
        ffn_shift, ffn_scale, ffn_gate = ffn_3BSD.unbind(0)
        cross = block.cross_attn
        y = self._read(stream, Norm.affine(block.norm3.weight, block.norm3.bias, block.eps, split))
        q_BLD = self._product(y, weights.cross_q, cross.q, dtype)
        q_BLD = rms_norm(q_BLD, cross.norm_q.weight, cross.norm_q.eps)
        k_BTNK, v_BTNK = text_kv
        q_BLNK = cross.split_heads(q_BLD).expand(v_BTNK.shape[0], -1, -1, -1)
        o_BLD = sequence.cross_attention(q_BLNK, k_BTNK, v_BTNK).flatten(2)
        stream.add(self._product(self.numbers.quantize_rows(o_BLD), weights.cross_o, cross.o, dtype), None)

        y = self._read(stream, Norm(ffn_shift, ffn_scale, block.eps, split))
        wide = self.numbers.gelu_quantize(self._product(y, weights.up, block.ffn[0], dtype))
        stream.add(self._product(wide, weights.down, block.ffn[2], dtype), ffn_gate)

    def _project(
        self,
        block: Block,
        weight: Operand,
        y: Operand,
        rope: tuple[Tensor, Tensor],
        run: AttentionRun,
        dtype: torch.dtype,
        split: bool,
    ) -> None:
        """q, k and v sent off: in one product, or with `split` one after another."""
        layer, dim = block.self_attn, y.width
        norms = {"q": layer.norm_q, "k": layer.norm_k}
        if not split:
            bias = torch.cat([layer.q.bias, layer.k.bias, layer.v.bias])
            qkv_BLD = self.numbers.linear(y, weight, bias, dtype)
            q, k, v = qk_norm_rope(
                qkv_BLD, layer.norm_q.weight, layer.norm_k.weight, rope, run.layout, layer.norm_q.eps
            )
            for name, x in zip(SEND_ORDER, (v, q, k), strict=True):
                run.send(name, x)
            return
        for name in SEND_ORDER:
            start = ("q", "k", "v").index(name) * dim
            part = weight.rows(slice(start, start + dim))
            x_BLD = self._product(y, part, getattr(layer, name), dtype)
            norm = norms.get(name)
            if norm is None:
                run.send(name, layer.split_heads(x_BLD), packed=False)
            else:
                run.send(name, norm_rope(x_BLD, norm.weight, rope, run.layout, norm.eps))

    def _read(self, stream: Stream, norm: Norm) -> Operand:
        """The stream's normalised copy, quantised, after the pending branch joined it."""

        def joining(x_BLD: Tensor, y_BLD: Tensor, gate_BSD: Tensor | None) -> tuple[Tensor, Operand]:
            return self.numbers.add_normalize(x_BLD, y_BLD, gate_BSD, norm)

        def plain(x_BLD: Tensor) -> Operand:
            copy: Operand = self.numbers.normalize(x_BLD, norm)
            return copy

        return stream.take(plain, joining)

    def _product(self, x: Operand, weight: Operand, layer: nn.Module, dtype: torch.dtype) -> Tensor:
        assert isinstance(layer, nn.Linear)
        return self.numbers.linear(x, weight, layer.bias, dtype)

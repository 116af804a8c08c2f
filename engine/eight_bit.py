"""A transformer's blocks in 8 or 4 bits: the formulas of `engine.fused.run_block` on quantised operands.

Each norm and the GELU end in the quantisation of the product that follows (a `Format`: `kernels.fp8_gemm` or
`kernels.nvfp4_gemm`), attention may take 8-bit operands (`kernels.attention_8bit`). Text keys and values,
norms, RoPE, the residual stream and what the preset keeps stay as they are.

Weights are quantised once, right after loading, where the memory plan leaves room for both forms; else at
each use, which reads and writes a weight once more a pass. On a node that an operator gives to such presets
(`--weights 8bit`) the loader quantises each block as it arrives, and the published weights are let go.

Shapes: B batch, L tokens here, D model width, S timestep sets.
"""

import logging
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from engine.attention import Attend, Sequence
from engine.config import DiTConfig, LoraUse
from engine.dit import Block, DiT
from engine.fused import SEND_ORDER, Stream
from engine.number_format import FORMATS, Format, Operand
from engine.presets import E4M3, NVFP4, EightBit, Preset
from kernels import attention_8bit
from kernels.norm_modulate import Norm
from kernels.qk_norm_rope import norm_rope, qk_norm_rope, rms_norm

if TYPE_CHECKING:
    from engine.attention import AttentionRun
    from engine.pipeline import Pipeline

PRODUCTS: Final = (
    "self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "cross_attn.q", "cross_attn.o",
    "ffn.0", "ffn.2",
)  # fmt: skip
log = logging.getLogger(__name__)


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
        self._loras: tuple[LoraUse, ...] = ()

    def refresh(self, loras: tuple[LoraUse, ...]) -> None:
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
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = vectors_6BSD.unbind(0)

        numbers = self.numbers
        y = self._read(stream, Norm(shift, scale, block.eps, split))
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
        stream.add(self._product(numbers.quantize_rows(o_BLD), weights.o, attention.o, dtype), gate)

        cross = block.cross_attn
        y = self._read(stream, Norm.affine(block.norm3.weight, block.norm3.bias, block.eps, split))
        q_BLD = self._product(y, weights.cross_q, cross.q, dtype)
        q_BLD = rms_norm(q_BLD, cross.norm_q.weight, cross.norm_q.eps)
        k_BTNK, v_BTNK = text_kv
        q_BLNK = cross.split_heads(q_BLD).expand(v_BTNK.shape[0], -1, -1, -1)
        o_BLD = sequence.cross_attention(q_BLNK, k_BTNK, v_BTNK).flatten(2)
        stream.add(self._product(numbers.quantize_rows(o_BLD), weights.cross_o, cross.o, dtype), None)

        y = self._read(stream, Norm(ffn_shift, ffn_scale, block.eps, split))
        wide = numbers.gelu_quantize(self._product(y, weights.up, block.ffn[0], dtype))
        stream.add(self._product(wide, weights.down, block.ffn[2], dtype), ffn_gate)

    def _project(
        self,
        block: Block,
        weight: Operand,
        y: Operand,
        rope: tuple[Tensor, Tensor],
        run: "AttentionRun",
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


class EightBitMode:
    """Puts a pipeline's blocks into 8 or 4 bits for the videos that ask for it, and back."""

    def __init__(
        self, pipeline: "Pipeline", attend: Attend, cross_attend: Attend, keep_weights: bool
    ) -> None:
        switch = Switch(attend)
        self.pipeline = pipeline
        self.blocks = EightBitBlocks(switch, keep_weights)
        self.fours = EightBitBlocks(switch, keep_weights, NVFP4)
        self.sequence = pipeline.mesh.sequence(switch, cross_attend)
        self._parts: EightBit | None = None  # of the video under way
        self._now: list[Block] = []

    def keep(self, room: int, config: DiTConfig) -> None:
        """Quantise all weights now if they take less than `room` bytes; 0 where blocks come and go.

        Where two formats are offered, 8 bits come first. Every rank must be told of the same rung, but may
        decide for itself: the numbers are the same.
        """
        offered = [p.eight_bit for p in self.pipeline.spec.presets if p.eight_bit and not p.refused]
        chosen = {block for parts in offered for block in self._chosen(parts)}
        if chosen and chosen <= set(self.blocks.held):
            log.info("8-bit weights: %d blocks, held alone", len(chosen))
            return
        experts = 1 if self.pipeline.low is None else 2
        for blocks in (self.blocks, self.fours):
            mine = [parts for parts in offered if self._blocks(parts) is blocks]
            name, size = blocks.numbers.NAME, experts * kept_bytes(config, blocks.numbers)
            blocks.keep_weights = size < room
            if not mine:
                continue
            kept = "kept" if blocks.keep_weights else "made at each use"
            log.info("%s weights: %.2f GiB %s", name, size / 2**30, kept)
            room -= size if blocks.keep_weights else 0
            for block in (b for parts in mine if blocks.keep_weights for b in self._chosen(parts)):
                blocks.weights(block)

    @contextmanager
    def using(self, preset: Preset | None) -> Iterator[None]:
        """While a video is made: its preset's blocks in 8 or 4 bits. Nothing for a preset without any."""
        parts = None if preset is None else preset.eight_bit
        if parts is None:
            yield
            return
        loras = self.pipeline.loras
        blocks = self._blocks(parts)
        blocks.refresh(() if loras is None else loras.current)
        blocks.attention = parts.attention
        plain, self.pipeline.sequence = self.pipeline.sequence, self.sequence
        self._parts, self._now = parts, self._chosen(parts)
        self.at_step(0)
        try:
            yield
        finally:
            self._set(None)
            self.pipeline.sequence, self._parts, self._now = plain, None, []

    def at_step(self, step: int) -> None:
        """Before each denoising step: the first ones may be the preset's lossless ones."""
        if self._parts is not None:
            self._set(self._blocks(self._parts) if step >= self._parts.first_steps else None)

    def _blocks(self, parts: EightBit) -> EightBitBlocks:
        """What runs the blocks of such a preset."""
        return self.fours if parts.form == NVFP4 else self.blocks

    def _set(self, numbers: EightBitBlocks | None) -> None:
        for block in self._now:
            block.eight = numbers

    def _chosen(self, parts: EightBit | None) -> list[Block]:
        """The blocks that a preset computes in 8 or 4 bits, of every expert."""
        if parts is None:
            return []
        experts: list[DiT] = [e for e in (self.pipeline.high, self.pipeline.low) if e is not None]
        return [
            block
            for expert in experts
            for index, block in enumerate(expert.blocks)
            if isinstance(block, Block) and not parts.keeps(index, len(expert.blocks))
        ]


def kept_bytes(config: DiTConfig, numbers: Format[Any] = FORMATS[E4M3]) -> int:
    """Device memory of an expert's quantised weights, scales included."""
    dim, ffn = config.dim, config.ffn_dim
    shapes = ((6 * dim, dim), (ffn, dim), (dim, ffn))  # q, k, v, o and the cross-attention's two
    return config.num_layers * sum(numbers.stored_bytes(*shape) for shape in shapes)

"""A transformer's blocks in 8 bits: the same formulas as `engine.fused.run_block`, products on e4m3 operands.

Each norm and the GELU end in the quantisation of the product that follows (`kernels.fp8_gemm`), attention
takes 8-bit operands (`kernels.attention_8bit`). Text keys and values, norms, RoPE, the residual stream and
what the preset keeps stay as they are.

Weights are quantised once, right after loading, where the memory plan leaves room for both forms; else at
each use, which reads and writes a weight once more a pass.

Shapes: B batch, L tokens here, D model width, S timestep sets.
"""

import logging
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn

from engine.attention import Attend, Sequence
from engine.config import DiTConfig, LoraUse
from engine.dit import Block, DiT
from engine.fused import SEND_ORDER, Stream
from engine.kept_attention import attend_in_turns
from engine.presets import EightBit, Preset
from kernels import attention_8bit, fp8_gemm
from kernels.fp8_gemm import Rows
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
    """One block's matrices with a scale an output channel; q, k and v as one."""

    qkv: Rows
    o: Rows
    cross_q: Rows
    cross_o: Rows
    up: Rows
    down: Rows

    @staticmethod
    def of(block: Block) -> "Weights":
        """Quantised from what the block holds now."""
        q, k, v, *rest = (
            fp8_gemm.quantize_rows(block.get_submodule(name).get_parameter("weight").data)
            for name in PRODUCTS
        )
        parts = (q, k, v)
        data = torch.cat([part.data.view(torch.uint8) for part in parts]).view(q.data.dtype)
        return Weights(Rows(data, torch.cat([part.scale for part in parts])), *rest)


class EightBitBlocks:
    """What blocks in 8 bits share: their weights, if those are kept, and the attention's switch."""

    def __init__(self, switch: Switch, keep_weights: bool) -> None:
        self.switch, self.keep_weights = switch, keep_weights
        self.attention = True
        self._weights: dict[Block, Weights] = {}
        self._loras: tuple[LoraUse, ...] = ()

    def refresh(self, loras: tuple[LoraUse, ...]) -> None:
        """Forget weights that were quantised with other LoRAs in them."""
        if loras != self._loras:
            self._weights.clear()
            self._loras = loras

    def weights(self, block: Block) -> Weights:
        """The block's quantised matrices."""
        found = self._weights.get(block)
        if found is None:
            found = Weights.of(block)
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
        y = read(stream, Norm(shift, scale, block.eps, split))
        attention = self._attention(block, weights, y, rope, sequence, length, lane, dtype)
        del y
        stream.add((yield from attend_in_turns(block, lane, stream.x_BLD.shape[0], attention)), gate)
        self._others(block, weights, stream, vectors_6BSD[3:], split, text_kv, sequence)

    def _attention(
        self,
        block: Block,
        weights: Weights,
        y: Rows,
        rope: tuple[Tensor, Tensor],
        sequence: Sequence,
        length: int,
        lane: int,
        dtype: torch.dtype,
    ) -> Generator[None, None, Tensor]:
        """As `engine.fused.self_attention`."""
        attention = block.self_attn
        batch, tokens, dim = y.data.shape
        like = y.scale.new_empty(0, dtype=dtype)
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
        return _product(fp8_gemm.quantize_rows(o_BLD), weights.o, attention.o, dtype)

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
        y = read(stream, Norm.affine(block.norm3.weight, block.norm3.bias, block.eps, split))
        q_BLD = rms_norm(_product(y, weights.cross_q, cross.q, dtype), cross.norm_q.weight, cross.norm_q.eps)
        k_BTNK, v_BTNK = text_kv
        q_BLNK = cross.split_heads(q_BLD).expand(v_BTNK.shape[0], -1, -1, -1)
        o_BLD = sequence.cross_attention(q_BLNK, k_BTNK, v_BTNK).flatten(2)
        stream.add(_product(fp8_gemm.quantize_rows(o_BLD), weights.cross_o, cross.o, dtype), None)

        y = read(stream, Norm(ffn_shift, ffn_scale, block.eps, split))
        wide = fp8_gemm.gelu_quantize(_product(y, weights.up, block.ffn[0], dtype))
        stream.add(_product(wide, weights.down, block.ffn[2], dtype), ffn_gate)

    def _project(
        self,
        block: Block,
        weight: Rows,
        y: Rows,
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
            qkv_BLD = fp8_gemm.linear(y, weight, bias, dtype)
            q, k, v = qk_norm_rope(
                qkv_BLD, layer.norm_q.weight, layer.norm_k.weight, rope, run.layout, layer.norm_q.eps
            )
            for name, x in zip(SEND_ORDER, (v, q, k), strict=True):
                run.send(name, x)
            return
        for name in SEND_ORDER:
            start = ("q", "k", "v").index(name) * dim
            part = weight.rows(slice(start, start + dim))
            x_BLD = _product(y, part, getattr(layer, name), dtype)
            norm = norms.get(name)
            if norm is None:
                run.send(name, layer.split_heads(x_BLD), packed=False)
            else:
                run.send(name, norm_rope(x_BLD, norm.weight, rope, run.layout, norm.eps))


def read(stream: Stream, norm: Norm) -> Rows:
    """The stream's normalised copy in 8 bits, after the pending branch joined it."""
    return stream.take(
        lambda x_BLD: fp8_gemm.normalize(x_BLD, norm),
        lambda x_BLD, y_BLD, gate_BSD: fp8_gemm.add_normalize(x_BLD, y_BLD, gate_BSD, norm),
    )


def _product(x: Rows, weight: Rows, layer: nn.Module, dtype: torch.dtype) -> Tensor:
    assert isinstance(layer, nn.Linear)
    return fp8_gemm.linear(x, weight, layer.bias, dtype)


class EightBitMode:
    """Puts a pipeline's blocks into 8 bits for the videos that ask for it, and back."""

    def __init__(
        self, pipeline: "Pipeline", attend: Attend, cross_attend: Attend, keep_weights: bool
    ) -> None:
        switch = Switch(attend)
        self.pipeline = pipeline
        self.blocks = EightBitBlocks(switch, keep_weights)
        self.sequence = pipeline.mesh.sequence(switch, cross_attend)
        self._parts: EightBit | None = None  # of the video under way
        self._now: list[Block] = []

    def keep(self, room: int, config: DiTConfig) -> None:
        """Quantise all weights now if they take less than `room` bytes; 0 where blocks come and go.

        Every rank must be told of the same rung, but may decide for itself: the numbers are the same.
        """
        offered = [p.eight_bit for p in self.pipeline.spec.presets if p.eight_bit and not p.refused]
        experts = 1 if self.pipeline.low is None else 2
        size = experts * kept_bytes(config)
        self.blocks.keep_weights = size < room
        if not offered:
            return
        log.info("8-bit weights: %.2f GiB %s", size / 2**30, "kept" if size < room else "made at each use")
        for parts in offered if self.blocks.keep_weights else ():
            for block in self._chosen(parts):
                self.blocks.weights(block)

    @contextmanager
    def using(self, preset: Preset | None) -> Iterator[None]:
        """While a video is made: its preset's blocks in 8 bits. Does nothing for a preset without any."""
        parts = None if preset is None else preset.eight_bit
        if parts is None:
            yield
            return
        loras = self.pipeline.loras
        self.blocks.refresh(() if loras is None else loras.current)
        self.blocks.attention = parts.attention
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
            self._set(self.blocks if step >= self._parts.first_steps else None)

    def _set(self, numbers: EightBitBlocks | None) -> None:
        for block in self._now:
            block.eight = numbers

    def _chosen(self, parts: EightBit | None) -> list[Block]:
        """The blocks that a preset computes in 8 bits, of every expert."""
        if parts is None:
            return []
        experts: list[DiT] = [e for e in (self.pipeline.high, self.pipeline.low) if e is not None]
        return [
            block
            for expert in experts
            for index, block in enumerate(expert.blocks)
            if isinstance(block, Block) and not parts.keeps(index, len(expert.blocks))
        ]


def kept_bytes(config: DiTConfig) -> int:
    """Device memory of an expert's quantised weights, scales included."""
    dim, ffn = config.dim, config.ffn_dim
    return config.num_layers * (6 * dim * dim + 2 * dim * ffn + 4 * (7 * dim + ffn))

"""When a pipeline's blocks are in 8 or 4 bits: for the videos that ask for it, from which step on."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from engine.attention import Attend
from engine.config import DiTConfig
from engine.dit import DiT
from engine.dit_block import Block
from engine.eight_bit import EightBitBlocks, Switch
from engine.number_format import FORMATS, Format
from engine.presets import E4M3, NVFP4, EightBit, Preset

if TYPE_CHECKING:
    from engine.pipeline import Pipeline

log = logging.getLogger(__name__)


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
        blocks.refresh(() if loras is None else loras.merged)
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

"""A model of one video's seconds on 8 GPUs, from a block's measured milliseconds and a preset's skip pattern.

Modelled, not measured: blocks x passes x steps x the block's time at its share, less what the preset reuses,
plus exposed communication, plus the decode.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.presets import EIGHT_BIT, EightBit, Machine, offers

GPUS = 8


@dataclass(frozen=True)
class Assumptions:
    """What isn't measured by the run itself."""

    blocks: int = 40
    steps: int = 40
    passes: int = 2  # of a guided step
    communication: float = 0.01  # exposed, of the blocks' time
    decode_seconds: float | None = None  # of one GPU; None: not counted
    decode_efficiency: float = 0.7  # of the decode split over all GPUs

    def __post_init__(self) -> None:
        if not (self.steps > 0 and self.communication >= 0 and 0 < self.decode_efficiency <= 1):
            raise ValueError(f"{self}: expected steps over 0, communication from 0, an efficiency in (0, 1]")

    def lines(self) -> list[str]:
        """In words, to stand beside every modelled figure."""
        decode = (
            "the VAE's decode is not counted (--decode-seconds)"
            if self.decode_seconds is None
            else f"the VAE's decode is one GPU's {self.decode_seconds:g} s over {GPUS} GPUs "
            f"at {self.decode_efficiency:.0%} efficiency: {self.decoding:.2f} s (for the official rows too)"
        )
        return [
            f"{self.blocks} blocks x {self.passes} passes x {self.steps} steps = "
            f"{self.blocks * self.passes * self.steps:,} block times, both passes one after the other on all "
            f"{GPUS} GPUs (layout 1x{GPUS})",
            f"exposed communication {self.communication:.1%} of the blocks' time",
            decode,
            "not counted: text encoding, embeddings, head, sampler, writing the video",
        ]

    @property
    def decoding(self) -> float:
        """Seconds that the decode adds."""
        return 0.0 if self.decode_seconds is None else self.decode_seconds / (GPUS * self.decode_efficiency)


@dataclass(frozen=True)
class Pattern:
    """What a preset computes and how, by shares as `benchmarks.presets` writes them."""

    steps_reused: float = 0.0  # of all steps: no block runs
    guidance_reused: float = 0.0  # of the computed steps: one pass instead of two
    attention_reused: float = 0.0  # of the computed steps: blocks with a kept self-attention
    bits: EightBit | None = None  # None: every block is lossless
    keeps_floor: bool | None = None  # of quality; None: not known

    def __post_init__(self) -> None:
        shares = (self.steps_reused, self.guidance_reused, self.attention_reused)
        if not all(0 <= share <= 1 for share in shares):
            raise ValueError(f"shares {shares}: expected 0 to 1 each")


@dataclass(frozen=True)
class BlockTimes:
    """Milliseconds of one block's share."""

    lossless: float
    eight: float = 0.0
    kept: float | None = None  # in 8 bits with a kept self-attention


def denoising(times: BlockTimes, pattern: Pattern, given: Assumptions) -> float:
    """Modelled seconds of a video's denoising.

    A reused step runs no block at all (the whole stack's residual is kept). Reused guidance and attention are
    taken to fall on the computed steps independently. Blocks that `keep_blocks` names are lossless in every
    step, all blocks in the first `first_steps`. ValueError where attention is reused and `kept` isn't known.
    """
    computed = given.steps * (1 - pattern.steps_reused)
    bits = pattern.bits
    plain_steps = computed if bits is None else min(float(bits.first_steps), computed)
    kept_blocks = (
        given.blocks if bits is None else sum(bits.keeps(n, given.blocks) for n in range(given.blocks))
    )
    eight = times.eight
    if pattern.attention_reused and bits is not None:
        if times.kept is None:
            raise ValueError("attention is reused, but a block with a kept one was not measured")
        eight = (1 - pattern.attention_reused) * eight + pattern.attention_reused * times.kept
    whole_ms = given.blocks * times.lossless
    mixed_ms = kept_blocks * times.lossless + (given.blocks - kept_blocks) * eight
    passes = given.passes - pattern.guidance_reused * (given.passes - 1)
    blocks_ms = passes * (plain_steps * whole_ms + (computed - plain_steps) * mixed_ms)
    return blocks_ms * (1 + given.communication) / 1e3


def patterns(path: Path | None) -> dict[str, Pattern]:
    """Preset -> pattern, of those with 8 bits, from a file of `benchmarks.presets`.

    Without the file `8bit` alone, by the preset's own defaults. ValueError for a file that lacks anything.
    """
    if path is None:
        return {EIGHT_BIT: Pattern(bits=EightBit())}
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        told, measured = document["told"], document["presets"]
        known = {preset.name: preset.eight_bit for preset in offers(told, Machine())}
        found = {
            name: pattern(measured[name], bits)
            for name, bits in known.items()
            if name in told and name in measured and bits is not None and bits.form == EightBit.form
        }
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not what benchmarks.presets writes: {error!r}") from error
    # 8 bits alone reuse nothing, so without a measured pattern they are modelled all the same.
    return {EIGHT_BIT: Pattern(bits=known[EIGHT_BIT]), **found}


def pattern(row: Mapping[str, Any], bits: EightBit) -> Pattern:
    """From one preset's summary."""
    steps, guidance, attention = (
        share(row.get(f"{what} reused", "0%")) for what in ("steps", "guidance", "attention")
    )
    return Pattern(steps, guidance, attention, bits, row.get("may be offered"))


def share(told: str) -> float:
    """0.35 of "35.0%"."""
    return float(str(told).rstrip("% ")) / 100

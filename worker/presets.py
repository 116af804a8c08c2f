"""Quality presets between engine and queue: what a card says of them, and what a job's record does."""

from typing import Any, TypedDict

from engine.config import ModelSpec
from engine.presets import ONLY_LOSSLESS
from jobs.quality import LOSSLESS, PresetCard
from worker.video import VideoFacts


def preset_cards(spec: ModelSpec) -> list[PresetCard]:
    """The model's presets for its card, refused ones with the reason."""
    return [
        PresetCard(
            name=preset.name,
            summary=preset.summary,
            refused=preset.refused,
            sampling_steps=preset.few.steps if preset.few else None,
            shift=preset.few.shift if preset.few else None,
            guide_scale=(1.0, 1.0) if preset.few else None,
        )
        for preset in spec.presets or ONLY_LOSSLESS
    ]


class Made(TypedDict):
    """The fields of a VideoResult that tell the preset and what it left out."""

    quality: str
    steps_computed: int | None
    steps_reused: int
    guidance_reused: int
    attention_reused: int


def made(facts: VideoFacts) -> Made:
    """From a finished attempt's manifest; a video of an older node, found in the spool, was lossless."""
    work: Any = facts.manifest.get("work") or {}
    computed = work.get("steps_computed")
    return Made(
        quality=str(work.get("quality", LOSSLESS)),
        steps_computed=None if computed is None else int(computed),
        steps_reused=int(work.get("steps_reused", 0)),
        guidance_reused=int(work.get("guidance_reused", 0)),
        attention_reused=int(work.get("attention_reused", 0)),
    )

"""A model's quality presets as clients see them, each with the seconds that it will probably take."""

from typing import Any

from api.schemas import PresetOut
from api.services import Services
from jobs.job import ModelCard, VideoRequest
from jobs.quality import PresetCard, listed
from jobs.timings import Durations, Timings


def preset_views(svc: Services, card: ModelCard) -> list[PresetOut]:
    """Every preset of the card in its order; one that can't be asked for says why."""
    durations = Timings(svc.redis).of(card.name)
    return [
        PresetOut(
            name=preset.name,
            summary=preset.summary,
            offered=not preset.refused,
            reason=preset.refused or None,
            expected_seconds=None if preset.refused else _seconds(card, preset, durations),
            defaults=_defaults(preset),
        )
        for preset in listed(card.presets, svc.settings.forbidden)
    ]


def _seconds(card: ModelCard, preset: PresetCard, durations: Durations) -> float | None:
    """GPU seconds of a video with the model's defaults under this preset."""
    request = VideoRequest(
        prompt="-",
        model=card.name,
        size=card.default_size,
        frame_num=card.default_frame_num,
        shift=preset.shift or card.default_shift,
        sampling_steps=preset.sampling_steps or card.default_sampling_steps,
        guide_scale=preset.guide_scale or card.default_guide_scale,
        seed=0,
        sample_solver=card.sample_solvers[0],
        quality=preset.name,
    )
    seconds = durations.expect(request)
    return None if seconds is None else round(seconds, 2)


def _defaults(preset: PresetCard) -> dict[str, Any]:
    """What the preset changes of the model's defaults."""
    changed = preset.model_dump(include={"sampling_steps", "shift", "guide_scale"}, exclude_none=True)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in changed.items()}

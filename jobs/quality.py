"""Quality presets as the queue sees them: names, what a model's card says of them, what an operator forbids.

What a preset computes is the engine's business (`engine.presets`, whose names these are).
"""

from collections.abc import Collection

from pydantic import BaseModel

LOSSLESS = "lossless"
QUALITIES = (LOSSLESS, "8bit", "8bit-cache", "4bit", "draft")


class PresetCard(BaseModel):
    """A preset of one model: what it changes of the defaults, or why it can't be asked for."""

    name: str
    summary: str = ""
    refused: str = ""  # the reason; "": requests may name it
    sampling_steps: int | None = None  # instead of the model's default; None: the model's
    shift: float | None = None
    guide_scale: tuple[float, float] | None = None


def listed(presets: list[PresetCard], forbidden: Collection[str] = ()) -> list[PresetCard]:
    """The card's presets (lossless alone on the card of an older node), forbidden ones refused."""
    known = presets or [PresetCard(name=LOSSLESS)]
    reason = {"refused": "forbidden by the operator"}
    return [p.model_copy(update=reason) if p.name in forbidden else p for p in known]


def find(presets: list[PresetCard], name: str) -> PresetCard | None:
    """The preset of that name if requests may name it."""
    return next((p for p in listed(presets) if p.name == name and not p.refused), None)


def expected(presets: list[PresetCard], name: object) -> str:
    """For an error's text: what may be asked for, and why not for `name`."""
    known = listed(presets)
    offered = ", ".join(p.name for p in known if not p.refused) or "none"
    reason = next((p.refused for p in known if p.name == name), "")
    return f"one of {offered}" + (f"; {name}: {reason}" if reason else "")

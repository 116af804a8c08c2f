"""The request's fields as command line flags, shared by `reel generate` and `reel run`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from infra.errors import CliError


class Solver(StrEnum):
    """Samplers."""

    UNIPC = "unipc"
    DPM = "dpm++"


class WeightForm(StrEnum):
    """What a node keeps of the experts' blocks."""

    FULL = "full"
    EIGHT_BIT = "8bit"


Prompt = Annotated[str, typer.Argument(help="What the video shows, 1 to 2000 characters.")]
NegativePrompt = Annotated[str | None, typer.Option(help="What it should not show; else the model's own.")]
Size = Annotated[str | None, typer.Option(help="Width*height in pixels, such as 1280*720.", metavar="W*H")]
FrameNum = Annotated[int | None, typer.Option(help="Frames, 4n+1.")]
Shift = Annotated[float | None, typer.Option(help="Schedule shift: higher works longer on coarse motion.")]
SamplingSteps = Annotated[int | None, typer.Option(help="Denoising steps.")]
GuideScale = Annotated[
    str | None,
    typer.Option(
        help="Guidance: a number, or two with a comma (low-noise, high-noise expert).", metavar="G[,G]"
    ),
]
Seed = Annotated[int | None, typer.Option(help="The same seed and request give the same video.")]
SampleSolver = Annotated[Solver | None, typer.Option(help="Sampler.")]
Loras = Annotated[
    list[str] | None,
    typer.Option(help="A LoRA of the model's folder; repeatable.", metavar="NAME[:STRENGTH[:EXPERT]]"),
]
Quality = Annotated[
    str | None, typer.Option(help="A preset of the model's: 8bit, 8bit-cache, 4bit or draft; else lossless.")
]
Weights = Annotated[
    WeightForm | None,
    typer.Option(
        help="8bit: hold 8-bit weights alone, in less memory, and serve 8-bit presets only. "
        "Else full; a node also reads REEL_WEIGHTS."
    ),
]
Image = Annotated[Path | None, typer.Option(help="Image to start from, for models that take one.")]


def parse_guide_scale(text: str | None) -> float | tuple[float, float] | None:
    """``"3.0,4.0"`` to (3.0, 4.0), ``"5"`` to 5.0. Raises CliError on anything else."""
    if text is None:
        return None
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) == 1:
        return numbers[0]
    if len(numbers) == 2:
        return numbers[0], numbers[1]
    raise CliError(f"--guide-scale: got {text!r}, expected a number or two with a comma, such as 3.0,4.0")


def parse_loras(texts: list[str] | None) -> list[dict[str, Any]] | None:
    """``["style:0.7:low"]`` to [{"name": "style", "strength": 0.7, "expert": "low"}]. Raises CliError."""
    if not texts:
        return None
    loras: list[dict[str, Any]] = []
    for text in texts:
        name, strength, expert, *rest = *text.split(":"), "", ""
        try:
            lora = {"name": name, "strength": float(strength or 1.0), "expert": expert or "both"}
        except ValueError:
            lora = {}
        if len(rest) > 2 or not lora or not name or lora["expert"] not in ("both", "high", "low"):
            raise CliError(
                f"--loras: got {text!r}, expected NAME, NAME:0.7 or NAME:0.7:EXPERT (both, high, low)"
            )
        loras.append(lora)
    return loras


def parse_size(text: str | None) -> tuple[int, int] | None:
    """``"1280*720"`` (or with an x) to (1280, 720). Raises CliError on anything else."""
    if text is None:
        return None
    width, _, height = text.lower().replace("x", "*").partition("*")
    if width.isdigit() and height.isdigit():
        return int(width), int(height)
    raise CliError(f"--size: got {text!r}, expected width*height in pixels, such as 1280*720")

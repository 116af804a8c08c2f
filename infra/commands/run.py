"""`reel run` and `reel make-tiny`: the engine without any service."""

import logging
import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from infra.commands import fields
from infra.errors import CliError
from infra.models import given_model


class Dtype(StrEnum):
    """Of weights and matrix products."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


def run(
    prompt: fields.Prompt,
    model: Annotated[Path, typer.Option(help="Folder of the checkpoint.")],
    image: fields.Image = None,
    out: Annotated[Path, typer.Option(help="The MP4 to write.")] = Path("video.mp4"),
    dtype: Annotated[Dtype | None, typer.Option(help="Else bfloat16 on a GPU, float32 on a CPU.")] = None,
    save_latents: Annotated[
        Path | None, typer.Option(help="Also write the latents before the VAE (safetensors).")
    ] = None,
    negative_prompt: fields.NegativePrompt = None,
    size: fields.Size = None,
    frame_num: fields.FrameNum = None,
    shift: fields.Shift = None,
    sampling_steps: fields.SamplingSteps = None,
    guide_scale: fields.GuideScale = None,
    seed: fields.Seed = None,
    sample_solver: fields.SampleSolver = None,
    loras: fields.Loras = None,
    quality: fields.Quality = None,
    lora_dir: Annotated[
        Path | None, typer.Option(help="LoRAs' folder; else the checkpoint's loras/.")
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Compare the files' checksums first.")] = False,
    gpu_memory_gib: Annotated[
        float | None, typer.Option(help="GiB of a GPU that may be used; else all that is free.")
    ] = None,
    weights: fields.Weights = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Show all of the engine's log: loading rates, transports.")
    ] = False,
) -> None:
    """Make a video in this process, or in all processes of a torchrun; no queue, no Redis, no S3."""
    checkpoint = given_model(model)
    wanted_size, guidance = fields.parse_size(size), fields.parse_guide_scale(guide_scale)
    if image is not None and not image.is_file():
        raise CliError(f"--image: {image} is no file")
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(message)s")
    if os.environ.get("RANK", "0") == "0":  # the memory plan is always shown, by the rank that needs most
        logging.getLogger("engine.ladder").setLevel(logging.INFO)
    from engine.config import LoraUse
    from engine.run import run as run_engine

    uses = tuple(LoraUse(**lora) for lora in fields.parse_loras(loras) or [])

    run_engine(
        model=checkpoint,
        prompt=prompt,
        image=image,
        out=out,
        dtype=dtype.value if dtype else None,
        save_latents=save_latents,
        negative_prompt=negative_prompt,
        size=wanted_size,
        frame_num=frame_num,
        shift=shift,
        sampling_steps=sampling_steps,
        guide_scale=guidance,
        seed=seed,
        sample_solver=sample_solver.value if sample_solver else None,
        loras=uses,
        quality=quality,
        lora_dir=lora_dir,
        verify=verify,
        gpu_memory=None if gpu_memory_gib is None else int(gpu_memory_gib * 2**30),
        weights=weights.value if weights else "full",
    )


def make_tiny(
    folder: Annotated[Path, typer.Argument(help="Must not exist, or be empty.")],
    seed: Annotated[int, typer.Option(help="Of the random weights.")] = 0,
) -> None:
    """Make a tiny random checkpoint in the full official layout, for tests and trials."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CliError(f"{folder} exists and is not an empty folder: name another one")
    from engine.tiny import make_tiny as make

    make(folder, seed=seed)
    typer.echo(str(folder))


def register(app: typer.Typer) -> None:
    """Add these commands."""
    app.command(rich_help_panel="Make videos")(run)
    app.command("make-tiny", rich_help_panel="Make videos")(make_tiny)

"""`reel run`: one video in this process, or in all processes of a torchrun; no queue, no service."""

import os
import sys
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as ProgressBar

from engine.conditioning import output_size
from engine.config import FrameSink, GenerationRequest, LoraUse, Progress, Solver
from engine.errors import RequestError
from engine.load import WeightForm, default_device, load_pipeline
from engine.parallel.mesh import Mesh
from engine.pipeline import Pipeline
from engine.presets import LOSSLESS
from engine.requests import resolve
from engine.video import Mp4Writer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LONGEST_SEED = 2**32


def run(
    *,
    model: Path,
    prompt: str,
    out: Path,
    image: Path | None = None,
    dtype: str | None = None,
    save_latents: Path | None = None,
    negative_prompt: str | None = None,
    size: tuple[int, int] | None = None,
    frame_num: int | None = None,
    shift: float | None = None,
    sampling_steps: int | None = None,
    guide_scale: float | tuple[float, float] | None = None,
    seed: int | None = None,
    sample_solver: Solver | None = None,
    loras: tuple[LoraUse, ...] = (),
    quality: str | None = None,
    lora_dir: Path | None = None,
    verify: bool = False,
    gpu_memory: int | None = None,
    weights: WeightForm = "full",
) -> None:
    """Load the checkpoint, make the video, write the MP4 to `out`; prints the seed and the path.

    None means the model's default. `lora_dir`, `verify`, `gpu_memory` (bytes) and `weights` are
    `load_pipeline`'s.
    Under torchrun every process calls this, and rank 0 writes and prints.
    Raises CheckpointError, RequestError, VideoError.
    """
    if dtype is not None and dtype not in DTYPES:
        raise RequestError("dtype", dtype, ", ".join(DTYPES))
    mesh = Mesh.init() if int(os.environ.get("WORLD_SIZE", "1")) > 1 else Mesh.single()
    try:
        device = default_device(mesh)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        with LoadingBar(mesh.rank == 0) as bar:
            pipeline = load_pipeline(
                model,
                mesh=mesh,
                device=device,
                dtype=DTYPES.get(dtype or ""),
                loras=lora_dir,
                verify=verify,
                memory_limit=gpu_memory,
                weights=weights,
                on_bytes=bar.came,
            )
        request = resolve(
            pipeline.spec,
            prompt,
            size=size,
            frame_num=frame_num,
            shift=shift,
            sampling_steps=sampling_steps,
            guide_scale=(guide_scale,) if isinstance(guide_scale, (int, float)) else guide_scale,
            seed=mesh.share(int(torch.randint(LONGEST_SEED, ()))) if seed is None else seed,
            solver=sample_solver or "unipc",
            negative_prompt=negative_prompt or "",
            image=image,
            loras=loras,
            quality=quality or LOSSLESS,
        )
        if mesh.rank == 0:
            lead(pipeline, request, out, save_latents)
        else:
            pipeline.generate(request, NoFrames())
    finally:
        mesh.close()


def lead(pipeline: Pipeline, request: GenerationRequest, out: Path, save_latents: Path | None) -> None:
    """Rank 0's part: the progress bar, the MP4, the words."""
    print(f"seed {request.seed}", flush=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    out.parent.mkdir(parents=True, exist_ok=True)
    with ProgressBar(*columns, console=Console(file=sys.stderr)) as bar:
        tasks = {phase: bar.add_task(phase, total=None) for phase in ("encoding", "denoising", "decoding")}

        def on_progress(progress: Progress) -> None:
            bar.update(tasks[progress.phase], completed=progress.step, total=progress.steps)

        size = output_size(request, pipeline.spec)
        with Mp4Writer(out, *size, pipeline.spec.fps) as writer:
            result = pipeline.generate(request, writer, on_progress=on_progress, latents_out=save_latents)
    spent = ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in result.seconds.items())
    print(f"{result.frames} frames of {result.width}*{result.height} at {result.fps:g} fps: {spent}")
    print(out, flush=True)


class LoadingBar:
    """Bytes of the checkpoint's parts as they come, with GB/s; silent on other ranks than 0."""

    def __init__(self, shown: bool) -> None:
        columns = (
            TextColumn("loading {task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
        )
        self._bar = ProgressBar(*columns, console=Console(file=sys.stderr), disable=not shown)
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> "LoadingBar":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def came(self, part: str, size: int, total: int) -> None:
        """`size` more bytes of a part's `total`."""
        if part not in self._tasks:
            self._tasks[part] = self._bar.add_task(part, total=total)
        self._bar.advance(self._tasks[part], size)


class NoFrames(FrameSink):
    """The sink of the ranks that get no frames."""

    def write(self, frames: np.ndarray) -> None:
        """Never called: frames go to rank 0."""
        raise AssertionError("frames on a rank other than 0")

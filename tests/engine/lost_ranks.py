"""Ranks that are lost in the midst of a video, and what the others make of it."""

import os
import signal
import time
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.errors import OutOfMemory, RankLost, RequestError
from engine.load import load_pipeline
from engine.parallel import watch
from engine.pipeline import Pipeline
from engine.requests import resolve
from engine.tracker import Tracker
from tests.engine.ranks import GRIDS, case_latents, join
from tests.engine.sinks import Frames

LOSSES = ("killed", "killed where nothing times out", "hung")
FULL = "out of memory"  # a world of two, of which rank 1 fails by itself
LIMIT_SECONDS = 4.0  # for a lost rank to be noticed, in those worlds that lose one
STEP_TO_DIE = "denoising, step 1 of 3"


def lose_rank(loss: str, rank: int, folder: Path, checkpoint: Path) -> None:
    """Rank 1 of three is lost in the midst of a video; the two others notice and go on as a pair."""
    watch.GRACE_SECONDS = 1.0
    watch.FIRST_SECONDS = LIMIT_SECONDS
    nothing_times_out = loss == "killed where nothing times out"
    limit = 300.0 if nothing_times_out else LIMIT_SECONDS
    transport = "shared" if nothing_times_out else "collective"
    mesh = join(folder, "meeting", rank, 4, guidance=1, timeout_seconds=limit, transport=transport)
    pipeline = load_pipeline(checkpoint, mesh=mesh, device="cpu")
    mesh.meet()
    report = Tracker.report

    def until(self: Tracker, *step: object) -> None:
        report(self, *step)
        if rank == 1 and self.where == STEP_TO_DIE:
            (folder / "lost at").write_text(str(time.monotonic()))
            if loss == "hung":
                time.sleep(300)
            os.kill(os.getpid(), signal.SIGKILL)

    with mock.patch.object(Tracker, "report", until):
        try:
            case_latents(pipeline, GRIDS[0])
        except RankLost as lost:
            (folder / f"noticed.{rank}").write_text(f"{time.monotonic()} {lost}")
    mesh.close()
    if rank in (0, 2):
        mesh = join(folder, "second meeting", rank // 2, 2, guidance=1)
        pipeline.mesh, pipeline.sequence = mesh, mesh.sequence()
        latents = case_latents(pipeline, GRIDS[0])
        if rank == 0:
            save_file({"latents": latents}, folder / "after.safetensors")
        mesh.close()


def one_video(pipeline: Pipeline, folder: Path, name: str) -> None:
    """A whole video of three steps; its latents go to a file."""
    request = resolve(
        pipeline.spec, "a cat", frame_num=5, sampling_steps=3, shift=3.0, guide_scale=(2.0, 3.0), seed=8
    )
    pipeline.generate(request, Frames(), latents_out=folder / f"{name}.safetensors")


def fill_up(rank: int, folder: Path, checkpoint: Path) -> None:
    """After a job that both refuse and one that works, rank 1's memory is full in the second step.

    The job ends on both ranks, and both go on with the next one in a new group.
    """
    watch.FIRST_SECONDS = LIMIT_SECONDS
    mesh = join(folder, "meeting", rank, 2, guidance=1, timeout_seconds=LIMIT_SECONDS)
    pipeline = load_pipeline(checkpoint, mesh=mesh, device="cpu")
    flow, words = pipeline.flow, list[str]()

    def full(*arguments: object) -> Tensor:
        if rank == 1 and int(arguments[2]) < 999:  # type: ignore[call-overload]
            (folder / "full at").write_text(str(time.monotonic()))
            raise torch.OutOfMemoryError("tried to allocate 7 GiB")
        return flow(*arguments)  # type: ignore[arg-type]

    def refuse(*_: object) -> None:
        raise RequestError("seed", 8, "others: all ranks refuse alike")

    for attempt, does in (("refused", refuse), ("before", flow), ("first", full), ("again", flow)):
        try:
            with mock.patch.object(pipeline, "flow", does):
                one_video(pipeline, folder, attempt)
        except (OutOfMemory, RankLost, RequestError) as error:
            words.append(f"{time.monotonic()} {type(error).__name__} {error}")
    (folder / f"words.{rank}").write_text("\n".join(words))
    mesh.close()
    mesh = join(folder, "second meeting", rank, 2, guidance=1)
    pipeline.mesh, pipeline.sequence = mesh, mesh.sequence()
    one_video(pipeline, folder, "after")
    mesh.close()

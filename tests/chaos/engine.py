"""The deterministic engine of the chaos runs: everything around it is real, and it alone is not.

`build` has the signature of `worker.build.Builder`; a node gets it by ``REEL_ENGINE``. Frames are a function
of the seed. A prompt may hold directives, each for the first n runs of its job: ``oom=n`` raises
OutOfMemory, ``hang=n`` never makes another step, ``kill=n`` kills the raylet above the rank (and so the
node's whole cluster), ``die=n`` kills the rank; ``refuse`` raises RequestError always. Every run is written
to ``REEL_CHAOS_RUNS``/<seed>: what the checker counts.
"""

import os
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.config import (
    CancelCheck,
    Canceled,
    DiTConfig,
    FrameSink,
    GenerationRequest,
    GenerationResult,
    ModelSpec,
    Progress,
    ProgressCallback,
    VAEConfig,
)
from engine.errors import OutOfMemory, RequestError
from worker.plan import NodePlan

NAME = "chaos"
SIZE = (32, 32)
FRAMES = 5
SPEC = ModelSpec(
    name=NAME,
    task="t2v",
    dit=DiTConfig(dim=1, ffn_dim=1, num_heads=1, num_layers=1),
    vae=VAEConfig("2.1", base_dim=1, decoder_base_dim=1, z_dim=1, latent_mean=(0.0,), latent_std=(1.0,)),
    boundary=None,
    shift=1.0,
    sampling_steps=4,
    guide_scale=(1.0, 1.0),
    fps=8.0,
    frame_num=FRAMES,
    max_frame_num=FRAMES,
    sizes=(SIZE,),
    negative_prompt="",
)


@dataclass(frozen=True)
class Layout:
    """One rank."""

    size: int = 1
    guidance: int = 1
    ulysses: int = 1


class ChaosPipeline:
    """See the module."""

    spec = SPEC
    mesh = Layout()

    def __init__(self, runs: Path, step_seconds: float) -> None:
        self._runs, self._pause = runs, step_seconds

    def generate(
        self,
        request: GenerationRequest,
        sink: FrameSink,
        *,
        on_progress: ProgressCallback | None = None,
        should_cancel: CancelCheck | None = None,
    ) -> GenerationResult:
        """As engine.pipeline.Pipeline.generate."""
        began = time.monotonic()
        run = self._note(request.seed, "start")
        wanted = {name: int(number) for name, number in re.findall(r"(\w+)=(\d+)", request.prompt)}
        if "refuse" in request.prompt:
            raise RequestError("prompt", "refuse", "anything else")
        for step in range(request.sampling_steps + 1):
            if on_progress is not None:
                on_progress(Progress("denoising", step, request.sampling_steps))
            if should_cancel is not None and should_cancel():
                raise Canceled(f"at step {step}")
            time.sleep(self._pause)
            if step == 1:
                self._misbehave(wanted, run)
        sink.write(frames_of(request.seed))
        self._note(request.seed, "done")
        seconds = {"denoising": time.monotonic() - began}
        return GenerationResult(*SIZE, FRAMES, SPEC.fps, request.seed, seconds)

    def _misbehave(self, wanted: dict[str, int], run: int) -> None:
        if run <= wanted.get("oom", 0):
            raise OutOfMemory("as the prompt asked")
        if run <= wanted.get("hang", 0):
            time.sleep(3600)
        if run <= wanted.get("kill", 0):
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(3600)
        if run <= wanted.get("die", 0):
            os.kill(os.getpid(), signal.SIGKILL)

    def _note(self, seed: int, what: str) -> int:
        """Append a line to the job's own file; how many runs have started."""
        path = self._runs / str(seed)
        with path.open("a") as file:
            file.write(f"{what} {os.getpid()}\n")
        return path.read_text().count("start")


def frames_of(seed: int) -> np.ndarray:
    """[FRAMES, 32, 32, 3] uint8 RGB: one colour a seed, so that a video tells whose it is."""
    colour = np.array([seed & 0xF0, (seed >> 4) & 0xF0, (seed >> 8) & 0xF0], dtype=np.uint8)
    return np.broadcast_to(colour, (FRAMES, SIZE[1], SIZE[0], 3)).copy()


def build(plan: NodePlan, index: int, rendezvous: Path) -> ChaosPipeline:
    """The builder."""
    return ChaosPipeline(
        Path(os.environ["REEL_CHAOS_RUNS"]), float(os.environ.get("REEL_CHAOS_STEP_SECONDS", "0.05"))
    )

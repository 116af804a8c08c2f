"""What the node benchmark runs on every rank: a layout's steps, its videos, their parity, the official step.

All ranks call everything together.
"""

import math
import statistics
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks._measure import Sampler
from benchmarks._node_model import SEED, Node
from benchmarks._official_step import OfficialStep
from benchmarks._together import shared, together
from benchmarks._variants import library
from benchmarks._verify import WrongResult, relative_error
from engine.attention import Attend, sdpa
from engine.conditioning import make_conditioning, output_size
from engine.config import GenerationRequest
from engine.dit import DiT
from engine.dit_block import TextKV
from engine.parallel.mesh import Mesh
from engine.parallel.push import PushTransport
from engine.pipeline import Pipeline
from engine.presets import LOSSLESS, find
from engine.run import NoFrames
from engine.tracker import Tracker
from engine.video import Mp4Writer

TIMESTEPS = {"high": 950, "low": 500}  # on either side of the boundary
OFFICIAL_ERROR = 0.05  # between two computations whose products are in bf16, over all blocks


class Steps:
    """A guided prediction of each expert at a size, on whatever layout the node is on."""

    def __init__(self, node: Node, size: tuple[int, int] | None, frame_num: int | None) -> None:
        self.node = node
        pipeline = node.pipeline
        self.request = node.request(size, 2, SEED, frame_num=frame_num)
        with torch.inference_mode():
            self.image = make_conditioning(self.request, pipeline.spec, pipeline.vae, pipeline.mesh.space)
            self.latents = self.image.pin(pipeline.noise(self.request, self.image.size))
            self.text_2TE = pipeline.encode(self.request)
        self.guide = self.request.guide_scale[0]

    def experts(self) -> dict[str, DiT]:
        """By name; a lone one is "low"."""
        pipeline = self.node.pipeline
        return (
            {"low": pipeline.high} if pipeline.low is None else {"high": pipeline.high, "low": pipeline.low}
        )

    def grid(self, expert: DiT) -> tuple[int, int, int]:
        """Of the tokens."""
        return expert.token_grid(self.image.model_input(self.latents)[None])

    def ours(self, pipeline: Pipeline, expert: str) -> Any:
        """A step as the pipeline makes it."""
        texts: dict[tuple[int, ...], TextKV] = {}
        model, t = self.experts()[expert], TIMESTEPS[expert]
        return lambda: pipeline.flow(model, self.guide, t, self.latents, self.text_2TE, texts, self.image)

    def official(self, expert: str, attend: Attend) -> Any:
        """A step as the official code makes it over all ranks by Ulysses."""
        model, t = self.experts()[expert], TIMESTEPS[expert]
        group = dist.group.WORLD if self.node.world > 1 else None
        with torch.inference_mode():
            texts = model.encode_text(self.text_2TE)
        step = OfficialStep(model, self.grid(model), attend, self.node.device, group)
        latents = self.image.model_input(self.latents)
        return lambda: step(latents, t, texts, self.guide)


def official_attends(device: torch.device) -> dict[str, Attend]:
    """The official requirement first."""
    if device.type == "cpu":
        return {"SDPA": sdpa}
    return {"FlashAttention-2": library("flash2"), "cuDNN": library("cudnn")}


def time_steps(
    node: Node, steps: Steps, layout: str, seconds: float, quality: str = LOSSLESS
) -> dict[str, Any]:
    """Sustained milliseconds of each expert's step, and with the transfers off."""
    pipeline = node.on(layout)
    found: dict[str, Any] = {}
    transport = pipeline.mesh.transport
    pushes = isinstance(transport, PushTransport)
    preset = find(pipeline.spec.presets, quality)
    for expert in steps.experts():
        step = steps.ours(pipeline, expert)
        with pipeline.eight.using(preset):
            if preset is not None and preset.eight_bit is not None:
                pipeline.eight.at_step(preset.eight_bit.first_steps)
            row: dict[str, Any] = together(step, seconds, node.device).json()
            if pushes:
                assert isinstance(transport, PushTransport)
                transport.silent = True
                quiet = together(step, seconds / 2, node.device, parts=False)
                transport.silent = False
                row |= {"without_transfers_ms": quiet.ms, "exposed_ms": row["ms"] - quiet.ms}
        found[expert] = row
    return found


def time_official(node: Node, steps: Steps, seconds: float) -> dict[str, Any]:
    """The low expert's official step by each attention, held to ours first; why not where it can't be run."""
    found: dict[str, Any] = {}
    pipeline = node.on(f"1x{node.world}")
    needs = official_bytes(math.prod(steps.grid(pipeline.high)), node.shape.dit.dim, node.world)
    free = shared(free_bytes(node.device), node.device, dist.ReduceOp.MIN)
    if free < needs:
        return {
            "skipped": f"it needs {needs / 2**30:.1f} GiB beside our weights, {free / 2**30:.1f} are free"
        }
    want = steps.ours(pipeline, "low")()
    for name, attend in official_attends(node.device).items():
        step = steps.official("low", attend)
        error = shared(relative_error(step(), want), node.device)
        if not error <= OFFICIAL_ERROR:
            raise WrongResult(f"the official step by {name} is {error:.3g} from ours: no time is reported")
        found[name] = together(step, seconds, node.device, parts=False).json() | {"relative_error": error}
    return found


def official_bytes(tokens: int, dim: int, ranks: int) -> float:
    """Working memory of the official step: at its peak 23 fp32 values a token and channel, six of them e."""
    return 23 * 4 * math.ceil(tokens / ranks) * dim + 2 * 2**30


def free_bytes(device: torch.device) -> float:
    """What tensors may still take; on a CPU as much as they like."""
    if device.type == "cpu":
        return math.inf
    torch.cuda.empty_cache()
    return float(torch.cuda.mem_get_info(device)[0])


def video(pipeline: Pipeline, request: GenerationRequest) -> dict[str, Any]:
    """One whole video with its MP4: seconds of each phase and of all, clock, power, memory."""
    device, spec, lead = pipeline.device, pipeline.spec, dist.get_rank() == 0
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    sampler = Sampler() if cuda and lead else nullcontext()
    with tempfile.TemporaryDirectory() as folder, sampler:
        path = Path(folder) / "video.mp4"
        dist.barrier()
        began = time.perf_counter()
        if lead:
            size = output_size(request, spec)
            with Mp4Writer(path, *size, spec.fps) as writer:
                result = pipeline.generate(request, writer)
            if writer.frames != request.frame_num:
                raise WrongResult(f"{writer.frames} frames were written, {request.frame_num} expected")
        else:
            result = pipeline.generate(request, NoFrames())
        total = time.perf_counter() - began
        size_bytes = path.stat().st_size if lead else 0
    clock, power = sampler.medians() if isinstance(sampler, Sampler) else (math.nan, math.nan)
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if cuda else 0.0
    return {
        "seconds": {phase: round(s, 3) for phase, s in result.seconds.items()} | {"total": round(total, 3)},
        "prompt_characters": len(request.prompt), "steps": request.sampling_steps, "seed": request.seed,
        "steps_computed": result.work.steps_computed, "mp4_bytes": size_bytes,
        "clock_mhz": clock, "power_w": power, "peak_gib": shared(peak, device),
    }  # fmt: skip


def median_video(videos: list[dict[str, Any]]) -> dict[str, float]:
    """Each phase's median."""
    phases = videos[0]["seconds"]
    return {phase: statistics.median(one["seconds"][phase] for one in videos) for phase in phases}


def parity(node: Node, layout: str, steps: int, frame_num: int, size: tuple[int, int]) -> dict[str, Any]:
    """A short video's latents on one rank and on the layout: relative error, beside two runs on one.

    The yardstick on a GPU is one rank with another attention kernel: two runs in bf16 of the same arithmetic.
    Raises WrongResult where the layout is further off than 1.5 times that.
    """
    request = node.request(size, steps, SEED, frame_num=frame_num)
    alone = latents_of(node, "1x1", request)
    pipeline = node.on("1x1")
    attend = library("cudnn") if node.device.type == "cuda" else sdpa
    usual, pipeline.sequence = pipeline.sequence, Mesh.single().sequence(attend, attend)
    other = latents_of(node, "1x1", request)
    pipeline.sequence = usual
    between = relative_error(other, alone)
    error = shared(relative_error(latents_of(node, layout, request), alone), node.device)
    if not error <= max(1.5 * between, 1e-4):
        raise WrongResult(f"{layout}: latents are {error:.3g} from one rank's, two runs there {between:.3g}")
    return {"two runs on one rank": between, layout: error}


def latents_of(node: Node, layout: str, request: GenerationRequest) -> Tensor:
    """The request's latents, the same on every rank, by the pipeline's own denoising."""
    pipeline = node.on(layout)
    with torch.inference_mode():
        text_2TE = pipeline.encode(request)
        image = make_conditioning(request, pipeline.spec, pipeline.vae, pipeline.mesh.space)
        noise = pipeline.noise(request, image.size)
        tracker = Tracker(pipeline.mesh, node.device, None, None)
        return pipeline.denoise(request, text_2TE, noise, image, tracker).float().cpu()

"""What the node benchmark runs on every rank: a whole model on a layout, its steps, its videos, their parity.

All ranks call everything together. Layouts share the weights; one layout's windows exist at a time.
"""

import math
import statistics
import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from benchmarks._measure import Sampler
from benchmarks._official_step import OfficialStep
from benchmarks._random_model import FULL, TINY, Shape, layout_of, random_pipeline
from benchmarks._together import shared, together
from benchmarks._variants import library
from benchmarks._verify import WrongResult, relative_error
from engine.attention import Attend, pick_attend, sdpa
from engine.conditioning import make_conditioning, output_size
from engine.config import GenerationRequest
from engine.dit import DiT
from engine.dit_block import TextKV
from engine.ladder import plan_memory
from engine.load import capability
from engine.parallel.mesh import Mesh
from engine.parallel.push import PushTransport
from engine.pipeline import Pipeline
from engine.presets import Machine, offers
from engine.requests import resolve
from engine.run import NoFrames
from engine.specs import I2V_A14B
from engine.tracker import Tracker
from engine.video import Mp4Writer

TIMEOUT_SECONDS = 300.0  # steps of one GPU are long
TIMESTEPS = {"high": 950, "low": 500}  # on either side of the boundary
SEED = 0
OFFICIAL_ERROR = 0.05  # between two computations whose products are in bf16, over all blocks
SENTENCE = "A tall ship under full sail rounds the headland at dawn while gulls wheel over the white water. "
CHARACTERS = (512, 32, 128)  # prompts of the seed's benchmark, 32 to 512


def prompt_of(characters: int) -> str:
    """English words of exactly so many characters."""
    return (SENTENCE * (characters // len(SENTENCE) + 1))[: characters - 1].rstrip().ljust(characters, ".")


def rehearsed(model: str) -> Shape:
    """The tiny model at two sizes, one with an odd number of tokens, and 8 heads for as many ranks."""
    shape = TINY["5B" if model == "5B" else "A14B"]
    cell = 32 if model == "5B" else 16
    facts = replace(shape.facts, sizes=((5 * cell, 3 * cell), (cell, 3 * cell)), frame_num=9, max_frame_num=9)
    channels = 36 if model == "I2V" else shape.dit.in_channels
    facts = replace(facts, name=I2V_A14B.name, task=I2V_A14B.task) if model == "I2V" else facts
    return replace(shape, facts=facts, dit=replace(shape.dit, num_heads=8, dim=128, in_channels=channels))


class Node:
    """A model with random weights on this rank, and the layout that it is on now."""

    def __init__(self, model: str, device: torch.device, told: dict[str, Any], tiny: bool) -> None:
        self.device, self.world = device, dist.get_world_size()
        on_gpu = device.type == "cuda"
        self.dtype = torch.bfloat16 if on_gpu else torch.float32
        vae_dtype = torch.float16 if on_gpu else torch.float32
        self.shape: Shape = rehearsed(model) if tiny else FULL[model]
        mesh = self._join(f"1x{self.world}")
        plan = plan_memory(self.shape.spec, layout_of(self.shape), mesh, device, self.dtype, vae_dtype)
        torch.manual_seed(SEED)  # the same weights on all ranks
        made = random_pipeline(self.shape, plan, device, self.dtype, vae_dtype, mesh)
        presets = offers(told, Machine(capability(device)))
        made.spec = replace(made.spec, presets=presets)
        self.memory = {"rung": plan.rung, "planned_gib": plan.gib}
        self._room = max(0, plan.available - plan.total)
        made.eight.keep(self._room, self.shape.dit)
        self.pipeline = made

    def _join(self, layout: str) -> Mesh:
        guidance, parts = map(int, layout.split("x"))
        if guidance * parts == 1:
            return Mesh.single()
        return Mesh.init(
            guidance=guidance, ulysses=parts, device=self.device, timeout_seconds=TIMEOUT_SECONDS
        )

    def on(self, layout: str) -> Pipeline:
        """The pipeline on that layout; the last one's windows are given back."""
        old = self.pipeline
        if layout != old.mesh.layout:
            self._leave()
            head = self.shape.dit.head_dim
            attends = (pick_attend(kind, self.dtype, head, self.device) for kind in ("self", "cross"))  # type: ignore[arg-type]
            made = Pipeline(
                old.spec,
                old.text_encoder,
                old.high,
                old.low,
                old.vae,
                self._join(layout),
                self.device,
                *attends,
            )
            made.branches_in_turn = old.branches_in_turn
            made.eight.keep(self._room, self.shape.dit)
            self.pipeline = made
        return self.pipeline

    def _leave(self) -> None:
        mesh = self.pipeline.mesh
        dist.barrier()
        for held in (mesh.transport, mesh.watch):
            if held is not None:
                held.close()

    def close(self) -> None:
        """Give back what the layout holds."""
        self._leave()

    def request(self, size: tuple[int, int] | None, steps: int, seed: int, **more: Any) -> GenerationRequest:
        """A request at the largest size unless given, with a picture where the model wants one."""
        prompt = prompt_of(CHARACTERS[seed % len(CHARACTERS)])
        spec = self.pipeline.spec
        if spec.task == "i2v":
            more["image"] = picture(size or spec.sizes[0])
        return resolve(spec, prompt, size=size, sampling_steps=steps, seed=seed, **more)


def picture(size: tuple[int, int]) -> Path:
    """A PNG of smooth random colours, the same on every rank and in every run."""
    path = Path(tempfile.gettempdir()) / f"reel-node-{size[0]}x{size[1]}-{dist.get_rank()}.png"
    generator = torch.Generator().manual_seed(SEED)
    small = torch.randint(256, (9, 16, 3), dtype=torch.uint8, generator=generator)
    Image.fromarray(small.numpy()).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


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


def time_steps(node: Node, steps: Steps, layout: str, seconds: float, quality: str = "") -> dict[str, Any]:
    """Sustained milliseconds of each expert's step, and with the transfers off."""
    pipeline = node.on(layout)
    found: dict[str, Any] = {}
    transport = pipeline.mesh.transport
    pushes = isinstance(transport, PushTransport)
    preset = next((p for p in pipeline.spec.presets if p.name == quality), None)
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
    """The low expert's official step by each attention, held to ours first."""
    found: dict[str, Any] = {}
    pipeline = node.on(f"1x{node.world}")
    want = steps.ours(pipeline, "low")()
    for name, attend in official_attends(node.device).items():
        step = steps.official("low", attend)
        error = shared(relative_error(step(), want), node.device)
        if not error <= OFFICIAL_ERROR:
            raise WrongResult(f"the official step by {name} is {error:.3g} from ours: no time is reported")
        found[name] = together(step, seconds, node.device, parts=False).json() | {"relative_error": error}
    return found


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


def parity(
    node: Node, layouts: list[str], steps: int, frame_num: int, size: tuple[int, int]
) -> dict[str, Any]:
    """A short video's latents on one rank and on each layout: relative errors, beside two runs on one.

    The yardstick on a GPU is one rank with another attention kernel: two runs in bf16 of the same arithmetic.
    Raises WrongResult where a layout is further off than 1.5 times that.
    """
    request = node.request(size, steps, SEED, frame_num=frame_num)
    alone = latents_of(node, "1x1", request)
    pipeline = node.on("1x1")
    attend = library("cudnn") if node.device.type == "cuda" else sdpa
    usual, pipeline.sequence = pipeline.sequence, Mesh.single().sequence(attend, attend)
    other = latents_of(node, "1x1", request)
    pipeline.sequence = usual
    between = relative_error(other, alone)
    found: dict[str, Any] = {"two runs on one rank": between}
    for layout in layouts:
        error = shared(relative_error(latents_of(node, layout, request), alone), node.device)
        found[layout] = error
        if not error <= max(1.5 * between, 1e-4):
            raise WrongResult(
                f"{layout}: latents are {error:.3g} from one rank's, two runs there {between:.3g}"
            )
    return found


def latents_of(node: Node, layout: str, request: GenerationRequest) -> Tensor:
    """The request's latents, the same on every rank, by the pipeline's own denoising."""
    pipeline = node.on(layout)
    with torch.inference_mode():
        text_2TE = pipeline.encode(request)
        image = make_conditioning(request, pipeline.spec, pipeline.vae, pipeline.mesh.space)
        noise = pipeline.noise(request, image.size)
        tracker = Tracker(pipeline.mesh, node.device, None, None)
        return pipeline.denoise(request, text_2TE, noise, image, tracker).float().cpu()

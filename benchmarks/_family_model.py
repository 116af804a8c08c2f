"""Sections of the family benchmark that hold a whole model: its memory, steps and decode; ten jobs of it."""

import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from benchmarks._family_bench import Bench, say
from benchmarks._random_model import random_pipeline
from engine.conditioning import Conditioning
from engine.config import GenerationRequest
from engine.dit import DiT
from engine.dit_block import TextKV
from engine.memory import GIB, MemoryPlan, Rung
from engine.pipeline import Pipeline
from engine.requests import resolve
from engine.tracker import Tracker
from engine.warmup import warm_up

JOBS = 10
GUIDE = 3.0
HIGH_T, LOW_T = 950, 500  # timesteps on either side of the boundary


class Count:
    """A sink that only counts."""

    frames = 0

    def write(self, frames: np.ndarray) -> None:
        """Count them."""
        self.frames += len(frames)


def model_section(bench: Bench, name: str, rung: Rung) -> None:
    """A whole model on the device: plan against peak, a guided step of each expert, a decode, the text."""
    shape = bench.shapes[name]
    plan = bench.plan(shape, rung)
    bench.emit("plan", plan_figures(plan))
    bench.emit("attention", attention_of(bench, shape.dit.head_dim))
    began = time.perf_counter()
    pipeline = random_pipeline(shape, plan, bench.device, bench.dtype, bench.vae_dtype)
    bench.wait()
    resident = {"made_in_seconds": time.perf_counter() - began} | bench.memory()
    say(f"resident: {resident}")
    bench.emit("resident", resident)
    request = largest_request(pipeline)
    kinds = {"": Conditioning(request.size)}
    if pipeline.spec.task == "ti2v":
        latents = pipeline.noise(request, request.size)
        kinds["with an image, "] = Conditioning(request.size, first_latent=latents[:, :1])
    experts = [("expert", pipeline.high, HIGH_T)]
    if pipeline.low is not None:
        experts = [("high", pipeline.high, HIGH_T), ("low", pipeline.low, LOW_T)]
    for label, kind in kinds.items():
        for expert_name, expert, t in experts:
            bench.part(f"{label}step of {expert_name}", lambda: step(bench, pipeline, expert, t, kind))  # noqa: B023
    if not bench.part("decode", lambda: decode(bench, pipeline)) and rung != "text":
        pipeline.text_encoder.to("cpu")  # type: ignore[attr-defined]
        bench.part("decode, text encoder on the CPU", lambda: decode(bench, pipeline))
    else:
        bench.part("text", lambda: text(bench, pipeline, request))


def plan_figures(plan: MemoryPlan) -> dict[str, Any]:
    """The plan's table as figures."""
    rows = {name: size / GIB for name, size in (*plan.rows, *plan.phases)}
    return {
        "rung": plan.rung,
        "gib": rows | {"total": plan.gib},
        "available_gib": plan.available / GIB,
        "fits": plan.fits,
    }


def attention_of(bench: Bench, head_dim: int) -> dict[str, str]:
    """Which attention serves this device."""
    if not bench.on_gpu:
        return {"self": "sdpa", "cross": "sdpa"}
    from kernels.attention import choice

    return {kind: str(choice(kind, bench.dtype, head_dim, bench.device)) for kind in ("self", "cross")}


def largest_request(pipeline: Pipeline) -> GenerationRequest:
    """The model's largest size and default frames."""
    return resolve(pipeline.spec, "a cat", size=pipeline.spec.sizes[0], seed=1)


def step(bench: Bench, pipeline: Pipeline, expert: DiT, t: int, kind: Conditioning) -> dict[str, Any]:
    """One guided step of an expert at the model's largest size, after one call that isn't counted.

    Where the branches come one after another, one of them in the first call has warmed all that both use.
    """
    spec, texts = pipeline.spec, dict[tuple[int, ...], TextKV]()
    with torch.inference_mode():
        latents = pipeline.noise(largest_request(pipeline), kind.size)
        text_2TE = torch.randn(2, spec.dit.text_len, spec.dit.text_dim, device=bench.device).to(bench.dtype)
        made: list[torch.Tensor] = []

        def flow(guide: float) -> None:
            made[:] = [pipeline.flow(expert, guide, t, latents, text_2TE, texts, kind)]

        first = bench.timed(lambda: flow(1.0 if pipeline.branches_in_turn else GUIDE))
        say(f"first call: {first:.2f} s")
        seconds = bench.timed(lambda: flow(GUIDE))
        if not made[0].isfinite().all():
            raise RuntimeError("the flow isn't finite: no time is reported")
    grid = [size // patch for size, patch in zip(latents.shape[1:], spec.dit.patch_size, strict=True)]
    return {
        "first_seconds": first,
        "seconds": seconds,
        "forwards": len(pipeline.passes(GUIDE)),
        "rows_a_forward": len(pipeline.passes(GUIDE)[0]),
        "tokens": grid[0] * grid[1] * grid[2],
    }


def decode(bench: Bench, pipeline: Pipeline) -> dict[str, Any]:
    """A decode of the default frames at the largest size, to uint8 frames on the host."""
    request = largest_request(pipeline)
    latents, sink = pipeline.noise(request, request.size), Count()
    with torch.inference_mode():
        seconds = bench.twice(lambda: pipeline.decode(latents, sink, Tracker(pipeline.mesh, pipeline.device)))
    return seconds | {"frames": sink.frames // 2, "size": request.size}


def text(bench: Bench, pipeline: Pipeline, request: GenerationRequest) -> dict[str, Any]:
    """The prompt and the negative prompt through the text encoder."""
    with torch.inference_mode():
        return bench.twice(lambda: pipeline.encode(request))


def ten_jobs(bench: Bench, warm: bool) -> None:
    """Ten equal jobs of a 5B model, short enough that what is done once would show."""
    shape = bench.shapes["5B"]
    frames = 5 if bench.tiny else 9
    shape = replace(shape, facts=replace(shape.facts, frame_num=frames, sizes=shape.facts.sizes[:1]))
    plan = bench.plan(shape, "resident")
    pipeline = random_pipeline(shape, plan, bench.device, bench.dtype, bench.vae_dtype)
    request = resolve(pipeline.spec, "a cat", seed=1, sampling_steps=4)
    if warm:
        bench.emit("warm_up_seconds", bench.timed(lambda: warm_up(pipeline)))
    seconds: list[float] = []
    for _ in range(JOBS):
        seconds.append(bench.timed(lambda: pipeline.generate(request, Count())))
        bench.emit("seconds", seconds)
    figures = {"first": seconds[0], "tenth": seconds[-1], "first_to_tenth": seconds[0] / seconds[-1]}
    say(f"jobs: {figures}")
    for name, value in figures.items():
        bench.emit(name, value)

"""Requests against a model: defaults filled in, every field checked before any work."""

import secrets
from pathlib import Path

from engine.config import GenerationRequest, LoraUse, ModelSpec, Solver
from engine.errors import RequestError
from engine.presets import LOSSLESS, allowed, find

MAX_STEPS = 1000
SHIFT_MIN = 0.01  # with the smallest numbers rounding leaves no schedule
MAX_STRENGTH = 10.0  # of a LoRA, either sign
MAX_LORAS = 8


def resolve(
    spec: ModelSpec,
    prompt: str,
    *,
    size: tuple[int, int] | None = None,
    frame_num: int | None = None,
    shift: float | None = None,
    sampling_steps: int | None = None,
    guide_scale: tuple[float, ...] | None = None,
    seed: int | None = None,
    solver: Solver = "unipc",
    negative_prompt: str = "",
    image: Path | None = None,
    noise_device: str = "cpu",
    loras: tuple[LoraUse, ...] = (),
    quality: str = LOSSLESS,
) -> GenerationRequest:
    """A checked request with the model's defaults for what isn't given; a random seed unless given.

    `guide_scale` of one number counts for both experts. Raises RequestError naming the first bad field.
    """
    preset = find(spec.presets, quality)
    few = None if preset is None else preset.few
    default_steps = spec.sampling_steps if few is None else few.steps
    default_shift = few.shift if few is not None and few.shift is not None else spec.shift
    default_guide = spec.guide_scale if few is None else (1.0,)
    guide = default_guide if guide_scale is None else guide_scale
    if len(guide) not in (1, 2):
        raise RequestError("guide_scale", guide, "one number, or two: low-noise, high-noise")
    request = GenerationRequest(
        prompt=prompt,
        size=size or spec.sizes[0],
        frame_num=spec.frame_num if frame_num is None else frame_num,
        shift=default_shift if shift is None else shift,
        sampling_steps=default_steps if sampling_steps is None else sampling_steps,
        guide_scale=(guide[0], guide[-1]),
        seed=secrets.randbelow(2**32) if seed is None else seed,
        solver=solver,
        negative_prompt=negative_prompt,
        image=image,
        noise_device=noise_device,
        loras=loras,
        quality=quality,
    )
    check(request, spec)
    return request


def check(request: GenerationRequest, spec: ModelSpec) -> None:
    """Raise RequestError if the model can't do what the request asks."""
    stride = spec.vae.stride[0]
    if not request.prompt.strip():
        raise RequestError("prompt", request.prompt, "some text")
    if request.size not in spec.sizes:
        sizes = ", ".join(f"{width}*{height}" for width, height in spec.sizes)
        raise RequestError("size", "{}*{}".format(*request.size), f"{sizes} (model {spec.name})")
    if request.frame_num % stride != 1 or not 1 <= request.frame_num <= spec.max_frame_num:
        raise RequestError("frame_num", request.frame_num, f"{stride}n+1, from 1 to {spec.max_frame_num}")
    if not 1 <= request.sampling_steps <= MAX_STEPS:
        raise RequestError("sampling_steps", request.sampling_steps, f"1 to {MAX_STEPS}")
    if not SHIFT_MIN <= request.shift <= 100:
        raise RequestError("shift", request.shift, f"{SHIFT_MIN:g} to 100")
    if not all(0 <= guide <= 100 for guide in request.guide_scale):
        raise RequestError("guide_scale", request.guide_scale, "0 to 100")
    if not 0 <= request.seed < 2**63:
        raise RequestError("seed", request.seed, "0 to 2^63 - 1")
    if request.solver not in ("unipc", "dpm++"):
        raise RequestError("sample_solver", request.solver, "unipc, dpm++")
    if find(spec.presets, request.quality) is None:
        raise RequestError("quality", request.quality, allowed(spec.presets, request.quality))
    if len(request.loras) > MAX_LORAS:
        raise RequestError("loras", len(request.loras), f"at most {MAX_LORAS}")
    if not all(abs(use.strength) <= MAX_STRENGTH for use in request.loras):
        strengths = [use.strength for use in request.loras]
        raise RequestError("loras", strengths, f"strengths from {-MAX_STRENGTH} to {MAX_STRENGTH}")
    if spec.task == "i2v" and request.image is None:
        raise RequestError("image", None, f"a picture's path: {spec.name} makes videos from images")
    if spec.task == "t2v" and request.image is not None:
        raise RequestError("image", str(request.image), f"none: {spec.name} makes videos from text alone")

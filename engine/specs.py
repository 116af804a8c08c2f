"""What is known of each model of the family: the facts that a checkpoint's tensors don't tell.

Sources: the official `wan/configs/*.py` and VAE files (Wan-Video/Wan2.2, Apache-2.0). A `reel.json` beside a
checkpoint overrides any of them.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from engine.config import DiTConfig, ModelSpec, Task, VAEConfig
from engine.errors import CheckpointError

NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，"
    "手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)

# fmt: off
LATENT_MEAN_21 = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)
LATENT_STD_21 = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)
LATENT_MEAN_22 = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557,
    -0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825,
    -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230,
    -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748,
    0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)
LATENT_STD_22 = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013,
    0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978,
    0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093,
    0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
    0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)
# fmt: on


@dataclass(frozen=True)
class Facts:
    """A model's facts beside its tensors; every field may be set in reel.json."""

    name: str
    task: Task
    boundary: float | None
    shift: float
    sampling_steps: int
    guide_scale: tuple[float, float]  # low-noise, high-noise
    fps: float
    frame_num: int
    max_frame_num: int
    sizes: tuple[tuple[int, int], ...]  # (width, height) in pixels; in reel.json "W*H" strings
    negative_prompt: str = NEGATIVE_PROMPT
    text_len: int = 512
    latent_mean: tuple[float, ...] = LATENT_MEAN_21
    latent_std: tuple[float, ...] = LATENT_STD_21
    presets: Mapping[str, Any] = field(default_factory=dict)  # see engine.presets


SIZES_A14B = ((1280, 720), (720, 1280), (832, 480), (480, 832))
T2V_A14B = Facts("T2V-A14B", "t2v", 0.875, 12.0, 40, (3.0, 4.0), 16, 81, 161, SIZES_A14B)
I2V_A14B = Facts("I2V-A14B", "i2v", 0.900, 5.0, 40, (3.5, 3.5), 16, 81, 161, SIZES_A14B)
TI2V_5B = Facts(
    "TI2V-5B", "ti2v", None, 5.0, 50, (5.0, 5.0), 24, 121, 241, ((1280, 704), (704, 1280)),
    latent_mean=LATENT_MEAN_22, latent_std=LATENT_STD_22,
)  # fmt: skip
KNOWN = {facts.name: facts for facts in (T2V_A14B, I2V_A14B, TI2V_5B)}


def known_facts(in_channels: int, two_experts: bool) -> Facts:
    """The family member that takes this many latent channels: 16 T2V, 36 I2V, else TI2V (one expert)."""
    if not two_experts:
        return TI2V_5B
    return I2V_A14B if in_channels == 36 else T2V_A14B


def find_facts(
    folder: Path,
    in_channels: int,
    two_experts: bool,
    name: str | None = None,
    told: Mapping[str, Any] | None = None,
) -> Facts:
    """The facts of the checkpoint in `folder`: the named or detected model's, overridden by its reel.json.

    `told` is what the layout's own files say; it counts more than what is known and less than reel.json.
    """
    if name is not None and name not in KNOWN:
        raise CheckpointError(f"unknown model {name!r}; known: {', '.join(KNOWN)}")
    base = KNOWN[name] if name else known_facts(in_channels, two_experts)
    base = replace(base, **(told or {}))
    path = folder / "reel.json"
    return override(base, path) if path.exists() else base


def override(base: Facts, path: Path) -> Facts:
    """`base` with what the reel.json at `path` says."""
    try:
        given: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    unknown = sorted(set(given) - {field.name for field in fields(Facts)})
    if unknown:
        raise CheckpointError(
            f"{path} has unknown fields {unknown}; known: {', '.join(field.name for field in fields(Facts))}"
        )
    try:
        if "sizes" in given:
            given["sizes"] = tuple(parse_size(size) for size in given["sizes"])
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: sizes: {error}") from error
    changes: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in given.items()}
    return replace(base, **changes)


def parse_size(text: str) -> tuple[int, int]:
    """(width, height) of "1280*720"; "1280x720" is understood too."""
    parts = text.lower().replace("x", "*").split("*")
    if len(parts) != 2 or not all(part.strip().isdigit() for part in parts):
        raise ValueError(f"size {text!r} is not width*height, such as 1280*720")
    return int(parts[0]), int(parts[1])


def make_spec(facts: Facts, dit: DiTConfig, vae: VAEConfig) -> ModelSpec:
    """Facts and architectures as one specification. Raises CheckpointError where they don't fit."""
    cell = (vae.stride[2] * dit.patch_size[2], vae.stride[1] * dit.patch_size[1])
    for size in facts.sizes:
        if size[0] % cell[0] or size[1] % cell[1]:
            raise CheckpointError(
                f"{facts.name}: size {size[0]}*{size[1]} doesn't divide into {cell[0]}*{cell[1]} (a token)"
            )
    return ModelSpec(
        name=facts.name,
        task=facts.task,
        dit=dit,
        vae=vae,
        boundary=facts.boundary,
        shift=facts.shift,
        sampling_steps=facts.sampling_steps,
        guide_scale=facts.guide_scale,
        fps=facts.fps,
        frame_num=facts.frame_num,
        max_frame_num=facts.max_frame_num,
        sizes=facts.sizes,
        negative_prompt=facts.negative_prompt,
    )


def describe(spec: ModelSpec) -> dict[str, Any]:
    """What a service needs to know of the model, under the field names of its model card (JSON types)."""
    multiple = spec.vae.stride[1] * spec.dit.patch_size[1]
    sizes = [f"{width}*{height}" for width, height in spec.sizes]
    return {
        "name": spec.name,
        "task": spec.task,
        "sizes": sizes,
        "fps": spec.fps,
        "default_size": sizes[0],
        "default_frame_num": spec.frame_num,
        "max_frame_num": spec.max_frame_num,
        "default_shift": spec.shift,
        "default_sampling_steps": spec.sampling_steps,
        "default_guide_scale": list(spec.guide_scale),
        "size_multiple": multiple,
    }

"""Frozen configurations: a model's architecture, what it may be asked for, and one request."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from engine.presets import Preset

Task = Literal["t2v", "i2v", "ti2v"]
Solver = Literal["unipc", "dpm++"]
Expert = Literal["both", "high", "low"]  # of a model with one expert, that is the high one


@dataclass(frozen=True)
class DiTConfig:
    """One expert's shape. All sizes are counts of features unless said otherwise."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    text_len: int = 512  # text tokens, zero-padded
    freq_dim: int = 256  # width of the timestep sinusoid
    patch_size: tuple[int, int, int] = (1, 2, 2)  # frames, rows, columns of latents a token
    eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        """Features per attention head."""
        return self.dim // self.num_heads


@dataclass(frozen=True)
class VAEConfig:
    """The causal 3-D VAE's shape and its latents' statistics."""

    kind: Literal["2.1", "2.2"]
    base_dim: int  # width of the encoder's first convolution
    decoder_base_dim: int
    z_dim: int  # latent channels
    latent_mean: tuple[float, ...]
    latent_std: tuple[float, ...]
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    stride: tuple[int, int, int] = (4, 8, 8)  # frames, rows, columns of pixels a latent


@dataclass(frozen=True)
class ModelSpec:
    """A checkpoint as a whole: architecture, sampling defaults, limits."""

    name: str
    task: Task
    dit: DiTConfig
    vae: VAEConfig
    boundary: float | None  # share of 1000 timesteps from which the high-noise expert works; None: one expert
    shift: float
    sampling_steps: int
    guide_scale: tuple[float, float]  # low-noise, high-noise
    fps: float
    frame_num: int
    max_frame_num: int
    sizes: tuple[tuple[int, int], ...]  # (width, height) in pixels
    negative_prompt: str
    loras: tuple[str, ...] = ()  # names of what the LoRA folder held when the model was loaded
    presets: tuple[Preset, ...] = ()  # refused ones too, with the reason; empty: lossless alone


@dataclass(frozen=True)
class LoraUse:
    """A LoRA of the model's LoRA folder, at a strength, for one expert or both."""

    name: str  # of the file, without its suffix
    strength: float = 1.0
    expert: Expert = "both"


@dataclass(frozen=True)
class GenerationRequest:
    """One video, every field resolved."""

    prompt: str
    size: tuple[int, int]  # width, height in pixels
    frame_num: int  # 4n+1
    shift: float
    sampling_steps: int
    guide_scale: tuple[float, float]  # low-noise, high-noise
    seed: int
    solver: Solver = "unipc"
    negative_prompt: str = ""  # "" means the model's own
    image: Path | None = None
    noise_device: str = "cpu"  # a seed means the same video everywhere only on the CPU
    loras: tuple[LoraUse, ...] = ()
    quality: str = "lossless"  # a preset's name, engine.presets


@dataclass(frozen=True)
class Progress:
    """Where a generation is: after `step` of `steps` in the named phase."""

    phase: Literal["encoding", "denoising", "decoding"]
    step: int
    steps: int


@dataclass(frozen=True)
class Work:
    """What a preset did and what it left out."""

    quality: str = "lossless"
    steps_computed: int = 0  # whose transformer blocks ran
    steps_reused: int = 0  # whose blocks' result was taken from an earlier step
    guidance_reused: int = 0  # of the computed ones, without the unconditional pass
    attention_reused: int = 0  # of the computed ones, with an earlier step's self-attention


@dataclass(frozen=True)
class GenerationResult:
    """What a finished generation was; the frames went to the sink."""

    width: int  # pixels; may differ from the asked size where the image decides the aspect
    height: int
    frames: int
    fps: float
    seed: int
    seconds: dict[str, float]  # wall seconds of each phase
    work: Work = Work()


class FrameSink(Protocol):
    """Takes frames in order while later ones are still being decoded."""

    def write(self, frames: np.ndarray) -> None:
        """Accept [n, height, width, 3] uint8 RGB frames."""
        ...


ProgressCallback = Callable[[Progress], None]
CancelCheck = Callable[[], bool]


class Canceled(Exception):
    """The generation stopped at a step boundary because its cancel check said so, on all ranks."""

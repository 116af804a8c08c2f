"""Before the first job: everything that is done once a shape is done, on the shapes that will be served.

What the first request would otherwise wait for: kernels compiled (or taken from the cache folder), attention
backends probed, cuDNN's and cuBLAS's plans, packed weights, position tables, the allocator's pools, text
encoder and ranks' channels in use once. CUDA graphs are not among it: a forward launches some 600 kernels
of milliseconds each, so launching is hidden at every size that is served.
"""

import logging
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.conditioning import Conditioning
from engine.dit import DiT
from engine.dit_block import TextKV
from engine.images import size_by_area
from engine.pipeline import Pipeline
from engine.presets import EightBit
from engine.tracker import Tracker

log = logging.getLogger(__name__)
DECODED = 3  # latent frames: the first, the second, and one like all others
PHOTO = (4, 3)  # the aspect of most pictures
PROMPT = "a warm-up"


@dataclass(frozen=True)
class Warm:
    """What was run: a size in pixels, and the seconds that each part took."""

    size: tuple[int, int]
    frames: int
    denoising: float  # one step of each expert
    decoding: float  # of three latent frames


def served_sizes(pipeline: Pipeline) -> list[tuple[int, int]]:
    """The model's sizes; where the image decides the aspect also a 4:3 picture's (an odd token count)."""
    spec = pipeline.spec
    sizes = list(spec.sizes)
    if spec.task == "i2v":
        area = max(width * height for width, height in sizes)
        sizes.append(size_by_area(PHOTO, area, spec.vae.stride[1], spec.dit.patch_size[1]))
    return list(dict.fromkeys(sizes))


def warm_up(pipeline: Pipeline) -> list[Warm]:
    """Run one step of each expert and a few frames of the decoder at every served size; a collective call.

    A step's kernels depend on the number of tokens alone, so of sizes with equal ones the second is decoded
    only.
    """
    began = time.perf_counter()
    done: list[Warm] = []
    seen: set[int] = set()
    with torch.inference_mode():
        prompts = (PROMPT, pipeline.spec.negative_prompt)
        text_2TE = torch.stack(pipeline.text_encoder.encode_all(prompts, pipeline.mesh))
        for size in served_sizes(pipeline):
            latents = _latents(pipeline, size)
            denoising = 0.0
            if latents.numel() not in seen:
                seen.add(latents.numel())
                with _Clock(pipeline.device) as clock:
                    if not pipeline.eight.blocks.held:  # else nothing can be asked for that would run it
                        _steps(pipeline, latents, size, text_2TE)
                    _steps_in_8_bits(pipeline, latents, size, text_2TE)
                denoising = clock.seconds
            with _Clock(pipeline.device) as clock:
                _frames(pipeline, latents, size)
            decoding = clock.seconds
            pipeline.mesh.meet()  # compilers may have taken one rank longer than another
            done.append(Warm(size, pipeline.spec.frame_num, denoising, decoding))
            log.info(
                "warm at %d*%d: a step of each expert %.2f s, %d latent frames decoded %.2f s",
                *size, denoising, min(DECODED, latents.shape[1]), decoding,
            )  # fmt: skip
    if pipeline.device.type == "cuda":
        torch.cuda.empty_cache()  # what only the first forward takes; NCCL's and the driver's own need room
    log.info("warm in %.1f s", time.perf_counter() - began)
    return done


def _latents(pipeline: Pipeline, size: tuple[int, int]) -> Tensor:
    stride_t, stride_h, stride_w = pipeline.spec.vae.stride
    frames = (pipeline.spec.frame_num - 1) // stride_t + 1
    shape = (pipeline.spec.vae.z_dim, frames, size[1] // stride_h, size[0] // stride_w)
    return torch.zeros(shape, device=pipeline.device)


def _steps(pipeline: Pipeline, latents: Tensor, size: tuple[int, int], text_2TE: Tensor) -> None:
    """One guided step of each expert, with each kind of conditioning that the model knows."""
    experts: list[DiT] = [pipeline.high] if pipeline.low is None else [pipeline.high, pipeline.low]
    kinds = [Conditioning(size)]
    if pipeline.spec.task == "i2v":
        extra = pipeline.spec.dit.in_channels - latents.shape[0]
        kinds = [Conditioning(size, channels=latents.new_zeros(extra, *latents.shape[1:]))]
    elif pipeline.spec.task == "ti2v":
        kinds.append(Conditioning(size, first_latent=latents[:, :1]))
    for kind in kinds:
        for index, expert in enumerate(experts):
            texts: dict[tuple[int, ...], TextKV] = {}
            if pipeline.exchange is not None:
                following = experts[(index + 1) % len(experts)]
                pipeline.exchange.step(expert, following, len(pipeline.passes(2.0)))
            pipeline.flow(expert, 2.0, 500, latents, text_2TE, texts, kind)


def _steps_in_8_bits(pipeline: Pipeline, latents: Tensor, size: tuple[int, int], text_2TE: Tensor) -> None:
    """The same by every preset in 8 bits that is offered: it has kernels of its own. Alike ones run once."""
    done: list[EightBit] = []
    for preset in pipeline.spec.presets:
        if preset.eight_bit is not None and preset.eight_bit not in done and not preset.refused:
            done.append(preset.eight_bit)
            with pipeline.eight.using(preset):
                pipeline.eight.at_step(preset.eight_bit.first_steps)
                _steps(pipeline, latents, size, text_2TE)


def _frames(pipeline: Pipeline, latents: Tensor, size: tuple[int, int]) -> None:
    """A few frames through the decoder, and through the encoder where images come in."""
    pipeline.decode(latents[:, :DECODED], _Nowhere(), Tracker(pipeline.mesh, pipeline.device))
    if pipeline.spec.task != "t2v":
        frames = 1 if pipeline.spec.task == "ti2v" else 1 + pipeline.spec.vae.stride[0]
        weight = next(pipeline.vae.parameters())
        space = pipeline.mesh.space(*latents.shape[2:])  # a whole frame may not fit
        pipeline.vae.encode(weight.new_zeros(1, 3, frames, size[1], size[0]), space)


class _Clock:
    """Wall seconds of a block, to the end of the device's work."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, 0.0

    def __enter__(self) -> "_Clock":
        self._began = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds = time.perf_counter() - self._began


class _Nowhere:
    """The sink of frames that nobody looks at."""

    def write(self, frames: np.ndarray) -> None:
        """Drop them."""

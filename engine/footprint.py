"""How much memory activations take: the real code, run on tensors that have shapes but no memory.

On the meta device an operation costs microseconds at any size, so a request of 147,600 tokens is measured
in a second, before any weight is loaded. What is counted is what torch allocates at the worst moment; a
library's own workspace is not seen.

Grids are of latents: frames, rows, columns.
"""

import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.attention import WholeSequence
from engine.config import DiTConfig, VAEConfig
from engine.dit import DiT, stays_fp32
from engine.vae import VAE

LAYERS = 2  # as many blocks as it takes for the peak of any number of them
CHUNKS = 3  # latent frames: the first, the second, and one like all others
Grid = tuple[int, int, int]


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors made while it is on: now alive, and at most alive at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: int = 0
        self.peak: int = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self._see(x, inputs)
        return result

    def _see(self, tensor: Tensor, inputs: set[int]) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._known or key in inputs:  # a view, or something older than this count
            return
        size = storage.nbytes()
        self._known.add(key)
        weakref.finalize(storage, self._forget, key, size)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


@contextmanager
def _unreal() -> Iterator[None]:
    with torch.device("meta"), torch.inference_mode():
        yield


@lru_cache(maxsize=64)
def denoising_bytes(config: DiTConfig, tokens: int, rows: int, dtype: torch.dtype, timesteps: int = 1) -> int:
    """Peak of one forward of a step, beside weights and text keys and values.

    `tokens` of one rank, `rows` prompts at once, `timesteps` sets (2: TI2V's image). Attention itself takes
    nothing but its output, as every fused backend has it.
    """
    config = replace(config, num_layers=min(config.num_layers, LAYERS))
    with torch.device("meta"):
        dit = DiT(config).requires_grad_(False)
        for name, parameter in dit.named_parameters():
            parameter.data = parameter.data.to(torch.float32 if stays_fp32(name) else dtype)
    patch_t, patch_h, patch_w = config.patch_size
    shape = (rows, config.text_len, config.num_heads, config.head_dim)
    with _unreal():
        latents = torch.empty(1, config.in_channels, patch_t, patch_h, patch_w * tokens)
        text = [
            (torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype))
            for _ in range(config.num_layers)
        ]
        t = torch.zeros(1, timesteps)

        def forward() -> object:
            return dit(latents, t, text, WholeSequence(lambda q, k, v: torch.empty_like(q)))

        forward()  # q, k and v are packed now
        with LiveBytes() as live:
            forward()
    return int(live.peak)


@lru_cache(maxsize=64)
def decoding_bytes(config: VAEConfig, grid: Grid, dtype: torch.dtype) -> int:
    """Peak of the VAE's decoder, frame by frame, beside its weights."""
    with _unreal():
        vae = VAE(config).to(dtype)
        with LiveBytes() as live:
            latents = torch.empty(1, config.z_dim, min(grid[0], CHUNKS), *grid[1:], dtype=dtype)
            for chunk in vae.decode_chunks(latents):
                chunk[0].float()
    return int(live.peak)


@lru_cache(maxsize=64)
def encoding_bytes(config: VAEConfig, grid: Grid, dtype: torch.dtype) -> int:
    """Peak of the VAE's encoder over a whole video of these latents, beside its weights."""
    stride_t, stride_h, stride_w = config.stride
    frames = (min(grid[0], CHUNKS) - 1) * stride_t + 1
    with _unreal():
        vae = VAE(config).to(dtype)
        with LiveBytes() as live:
            size = (grid[1] * stride_h, grid[2] * stride_w)
            vae.encode(torch.empty(1, 3, frames, *size, dtype=dtype))
    unseen = (grid[0] - min(grid[0], CHUNKS)) * stride_t
    # The later frames' pixels are there all along, and once more folded where the VAE folds them.
    later = unseen * 3 * math.prod(size) * dtype.itemsize * (1 if config.kind == "2.1" else 2)
    return int(live.peak + later)

"""How much memory activations take: the real code, run on tensors that have shapes but no memory.

On the meta device an operation costs microseconds at any size, so a request of 147,600 tokens is measured
in a second, before any weight is loaded. What is counted is what torch allocates at the worst moment; a
library's own workspace is not seen.

Shapes: B batch, C channels, F H W latent frames, rows and columns, L tokens, N heads, K head dimension.
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

from engine.config import DiTConfig, VAEConfig
from engine.dit import DiT, stays_fp32
from engine.vae import VAE

LAYERS = 2  # as many blocks as it takes for the peak of any number of them
CHUNKS = 3  # latent frames: the first, the second, and one like all others
Grid = tuple[int, int, int]  # latent frames, rows, columns


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


class PlannedSequence:
    """A sequence over `ranks` of which nothing is computed: attention gives empty tensors of its shapes."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks

    def shard(self, x: Tensor, dim: int) -> Tensor:
        """Rank 0's part; with one rank all of it."""
        part = -(-x.shape[dim] // self.ranks)
        return x if self.ranks == 1 else x.narrow(dim, 0, part).clone()

    def gather(self, x: Tensor, dim: int, length: int) -> Tensor:
        """The whole sequence."""
        return x if self.ranks == 1 else torch.cat([x] * self.ranks, dim).narrow(dim, 0, length)

    def split(self, first: int, length: int) -> int:
        """Rank 0's share of the first."""
        return min(first, -(-length // self.ranks))

    def self_attention(self, q_BLNK: Tensor, k_BLNK: Tensor, v_BLNK: Tensor, length: int) -> Tensor:
        """The output's memory."""
        return torch.empty_like(q_BLNK)

    def attend_by_rank(self, q_RBLGK: Tensor, k_RBLGK: Tensor, v_RBLGK: Tensor, length: int) -> Tensor:
        """The output's memory, [B, L, N * K]."""
        ranks, batch, tokens, heads, dim = q_RBLGK.shape
        return q_RBLGK.new_empty(batch, tokens, ranks * heads * dim)

    def cross_attention(self, q_BLNK: Tensor, k_BTNK: Tensor, v_BTNK: Tensor) -> Tensor:
        """The output's memory."""
        return q_BLNK.new_empty(q_BLNK.shape)


@contextmanager
def _unreal() -> Iterator[None]:
    with torch.device("meta"), torch.inference_mode():
        yield


@lru_cache(maxsize=64)
def denoising_bytes(
    config: DiTConfig, grid: Grid, rows: int, ranks: int, dtype: torch.dtype, timesteps: int = 1
) -> int:
    """Peak of one forward of a step, beside weights and text keys and values.

    `rows` prompts at once, `ranks` that the sequence is spread over, `timesteps` sets (2: TI2V's image).
    """
    config = replace(config, num_layers=min(config.num_layers, LAYERS))
    with torch.device("meta"):
        dit = DiT(config).requires_grad_(False)
        for name, parameter in dit.named_parameters():
            parameter.data = parameter.data.to(torch.float32 if stays_fp32(name) else dtype)
    with _unreal():
        latents = torch.empty(1, config.in_channels, *grid)
        text = [
            tuple(
                torch.empty(rows, config.text_len, config.num_heads, config.head_dim, dtype=dtype)
                for _ in range(2)
            )
            for _ in range(config.num_layers)
        ]
        t = torch.zeros(1, timesteps)

        def forward() -> object:
            return dit(latents, t, text, PlannedSequence(ranks))

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

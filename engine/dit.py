"""The Wan 2.2 diffusion transformer, as the maths reads. Parameter names are the official checkpoint's.

Shapes: B batch, C latent channels, F H W latent frames, rows and columns, L tokens, D model width,
T text tokens, E text width, N heads (written H in the other files), K head dimension, S timestep sets,
6 modulation vectors.

The batch broadcasts: latents of batch 1 with text of batch 2 (conditional, unconditional) give an output
of batch 2, and everything before the first cross-attention, whose input is the same for both, is done once.

The residual stream, all norms, the time MLPs and the head are fp32; the big matrix products run in the
dtype of their weights. Facts: the official `wan/modules/model.py` (Wan-Video/Wan2.2, Apache-2.0).
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine import fused, ops
from engine.attention import Sequence, WholeSequence
from engine.config import DiTConfig
from engine.dit_block import Block, TextKV, linear
from engine.rope import rope_table

# Tensors that stay fp32 when a checkpoint is cast to a smaller dtype (prefixes and suffixes of names).
FP32_PREFIXES = ("patch_embedding.", "time_embedding.", "time_projection.", "head.")
FP32_SUFFIXES = (".modulation", ".norm_q.weight", ".norm_k.weight", ".norm3.weight", ".norm3.bias")


def stays_fp32(name: str) -> bool:
    """Whether the named tensor of a DiT checkpoint keeps fp32 whatever dtype the model runs in."""
    return name.startswith(FP32_PREFIXES) or name.endswith(FP32_SUFFIXES)


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """What must stay fp32 while training runs under autocast; the meta device knows no autocast."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def sinusoid(timesteps_BS: Tensor, width: int) -> Tensor:
    """[B, S, width] fp32: cos then sin of t * 10000^(-i / (width/2)), computed in fp64."""
    half = width // 2
    rate = 10_000.0 ** -(torch.arange(half, dtype=torch.float64, device=timesteps_BS.device) / half)
    angle = timesteps_BS.double()[..., None] * rate
    return torch.cat((angle.cos(), angle.sin()), dim=-1).float()


class Head(nn.Module):
    """From the residual stream to the patches of the prediction, in fp32."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.head = nn.Linear(config.dim, math.prod(config.patch_size) * config.out_channels)
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)

    def forward(self, x_BLD: Tensor, time_BSD: Tensor, split: int) -> Tensor:
        """[B, L, patch * C_out] fp32. `time_BSD` is the time embedding before its projection."""
        shift_BSD, scale_BSD = (self.modulation.float() + time_BSD[:, :, None]).unbind(2)
        return linear(self.head, ops.modulated_norm(x_BLD, shift_BSD, scale_BSD, split, self.eps))


class Keeper(Protocol):
    """Brings the blocks' weights to the device where they don't all stay there; see `engine.offload`."""

    def visit(self, expert: "DiT", *, forward: bool) -> Iterator[Block]:
        """The expert's blocks in order, each usable until the next is asked for.

        `forward` tells a pass over the video from one over the text alone.
        """
        ...


class Around(Protocol):
    """What may stand in for the block stack; see `engine.cache`."""

    def __call__(self, x_BLD: Tensor, blocks: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Tensor:
        """The stream after the blocks, [B, L, D] fp32; `dtype` is their weights'."""
        ...


class DiT(nn.Module):
    """One expert: predicts the flow (noise minus video) of latents at a timestep, given text."""

    keeper: Keeper | None = None  # None: every block is on the device

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.patch_embedding = nn.Conv3d(config.in_channels, dim, config.patch_size, config.patch_size)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = Head(config)

    def forward(
        self,
        latents_BCFHW: Tensor,
        timesteps_BS: Tensor,
        text: TextKV,
        sequence: Sequence | None = None,
        around: Around | None = None,
    ) -> Tensor:
        """The predicted flow, [B, C_out, F, H, W] fp32.

        `timesteps_BS` is [B or 1, S]: one timestep for all tokens, or two, of which the first is that of
        the first latent frame's tokens. `text` comes from `encode_text`. `sequence` tells how the tokens
        are spread over ranks; every rank passes the whole latents and receives the whole prediction. `around`
        may run the blocks or put something else in their place.
        """
        sequence = sequence or WholeSequence()
        grid = self.token_grid(latents_BCFHW)
        length = math.prod(grid)
        split = sequence.split(grid[1] * grid[2], length) if timesteps_BS.shape[1] == 2 else 0
        cos, sin = rope_table(grid, self.config.head_dim, latents_BCFHW.device)
        rope = (sequence.shard(cos, 0), sequence.shard(sin, 0))

        x_BLD = self.embed_patches(sequence.shard(self.patchify(latents_BCFHW), 1))
        time_BSD, e_BS6D = self.embed_time(timesteps_BS)
        first = self._blocks()[0].self_attn.o.weight
        fast = fused.applies(first) or any(block.eight is not None for block in self._blocks())

        def run_blocks(x_BLD: Tensor) -> fused.Stream:
            blocks = self.visit_blocks(forward=True)
            if fast:
                return fused.run_blocks(blocks, x_BLD, e_BS6D, split, rope, text, sequence, length)
            for block, text_kv in zip(blocks, text, strict=True):
                x_BLD = block(x_BLD, e_BS6D, split, rope, text_kv, sequence, length)
            return fused.Stream(x_BLD)

        if around is None:
            stream = run_blocks(x_BLD)
        else:
            stream = fused.Stream(around(x_BLD, lambda x: run_blocks(x).joined(split), first.dtype))
        if fast:
            patches_BLP = fused.head(self.head, stream, time_BSD, split)
        else:
            with without_autocast(x_BLD):
                patches_BLP = self.head(stream.x_BLD, time_BSD, split)
        return self.unpatchify(sequence.gather(patches_BLP, 1, length), grid)

    def encode_text(self, text_BTE: Tensor) -> TextKV:
        """Every block's keys and values of text embeddings [B, T, E] (zeros past the prompt's end)."""
        hidden = F.gelu(linear(self.text_embedding[0], text_BTE), approximate="tanh")
        text_BTD = linear(self.text_embedding[2], hidden)
        return [block.cross_attn.keys_values(text_BTD) for block in self.visit_blocks(forward=False)]

    def embed_time(self, timesteps_BS: Tensor) -> tuple[Tensor, Tensor]:
        """(time embedding [B, S, D], its projection to six vectors [B, S, 6, D]), fp32."""
        with without_autocast(timesteps_BS):
            wave = sinusoid(timesteps_BS, self.config.freq_dim)
            time_BSD = linear(self.time_embedding[2], F.silu(linear(self.time_embedding[0], wave)))
            e_BSD6 = linear(self.time_projection[1], F.silu(time_BSD))
        return time_BSD, torch.unflatten(e_BSD6, -1, (6, -1))

    def embed_patches(self, patches_BLP: Tensor) -> Tensor:
        """The patch convolution as a matrix product over patches, fp32: [B, L, D]."""
        weight_DP = self.patch_embedding.weight.flatten(1)
        with without_autocast(patches_BLP):
            return F.linear(patches_BLP.to(weight_DP.dtype), weight_DP, self.patch_embedding.bias).float()

    def token_grid(self, latents_BCFHW: Tensor) -> tuple[int, int, int]:
        """Tokens along (frames, rows, columns); latents must divide into patches."""
        sizes, patch = latents_BCFHW.shape[2:], self.config.patch_size
        if any(size % p for size, p in zip(sizes, patch, strict=True)):
            raise ValueError(f"latents of {tuple(sizes)} (frames, rows, columns) don't divide into {patch}")
        frames, rows, columns = (size // p for size, p in zip(sizes, patch, strict=True))
        return frames, rows, columns

    def patchify(self, x_BCFHW: Tensor) -> Tensor:
        """[B, L, C * patch]: each token's latents, channels outermost, as the convolution's weight is."""
        p, q, r = self.config.patch_size
        b, c, f, h, w = x_BCFHW.shape
        x = x_BCFHW.reshape(b, c, f // p, p, h // q, q, w // r, r)
        return x.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(b, -1, c * p * q * r)

    def unpatchify(self, patches_BLP: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """[B, C_out, F, H, W] from the head's patches, whose channels are innermost."""
        p, q, r = self.config.patch_size
        x = patches_BLP.reshape(-1, *grid, p, q, r, self.config.out_channels)
        x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)
        return x.reshape(x.shape[0], -1, grid[0] * p, grid[1] * q, grid[2] * r)

    def init_weights(self) -> None:
        """The official initialisation, for training from scratch: Xavier, 0.02 embeddings, a zero head."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embedding.weight.flatten(1))
        for module in (*self.text_embedding, *self.time_embedding):
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.head.head.weight)

    def visit_blocks(self, *, forward: bool) -> Iterable[Block]:
        """The blocks in order, each on the device while it is used; a list where they all are."""
        return self._blocks() if self.keeper is None else self.keeper.visit(self, forward=forward)

    def _blocks(self) -> list[Block]:
        return [block for block in self.blocks if isinstance(block, Block)]

"""Block-sparse self-attention, tried without training: what it loses on the demo model for what it saves.

    python -m benchmarks.sparse [--model models/demo] [--count 6] [--out out/sparse.json]

An experiment in plain torch, which masks scores instead of skipping them; the engine knows nothing of it.
Tokens are grouped into tiles of the space-time grid, and a tile of queries sees some tiles of keys: those
near in space and time (sliding tiles, arXiv:2502.04507), or those of the most attention as mean-pooled q and
k estimate it (SpargeAttn, arXiv:2502.18137). The first steps and the first blocks stay dense. The floors are
the presets'. What is saved is counted: of self-attention's two products, and of a block's arithmetic at the
proportions of T2V-A14B at 1280x720 x 81 frames.

What 320 tokens can't tell: there, a tile is 1/20 of the video, heads have little that is far away to
ignore, and each pattern must hold for the whole. So a loss here is no proof against 75,600 tokens, and a win
would be no proof for them.

Shapes: B batch, L tokens, H heads, K head dimension, T tiles.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks._similarity import psnr_db
from benchmarks.calibrate import Trial, arguments, trial_of
from benchmarks.presets import FLOOR_DB
from benchmarks.reuse import A14B, TOKENS
from engine.attention import WholeSequence, sdpa
from engine.presets import CACHED, LOSSLESS

Grid = tuple[int, int, int]  # frames, rows, columns
TILE: Grid = (1, 4, 4)
Choose = Callable[[Tensor, Tensor], Tensor]  # q and k [B, L, H, K] -> bool, broadcasts to [B, H, T, T]


@dataclass(frozen=True)
class Tiles:
    """A grid of tokens, numbered frame by frame and row by row, in tiles."""

    grid: Grid
    tile: Grid = TILE

    @property
    def counts(self) -> Grid:
        """Tiles along each axis; the last of an axis may be smaller."""
        f, r, c = (-(-size // part) for size, part in zip(self.grid, self.tile, strict=True))
        return f, r, c

    def of_tokens(self) -> Tensor:
        """[L]: the tile of each token."""
        axes = [torch.arange(size) // part for size, part in zip(self.grid, self.tile, strict=True)]
        f, r, c = torch.meshgrid(*axes, indexing="ij")
        return ((f * self.counts[1] + r) * self.counts[2] + c).flatten()

    def places(self) -> Tensor:
        """[T, 3]: each tile's place along frames, rows and columns."""
        return torch.cartesian_prod(*(torch.arange(count) for count in self.counts))

    def mean(self, x_BLHK: Tensor) -> Tensor:
        """[B, H, T, K] fp32: the tokens' mean in each tile."""
        tile_L = self.of_tokens()
        one_hot_TL = F.one_hot(tile_L).T.float()
        weight_TL = one_hot_TL / one_hot_TL.sum(1, keepdim=True)
        return torch.einsum("tl,blhk->bhtk", weight_TL, x_BLHK.float())


def near(tiles: Tiles, frames: int, space: int) -> Choose:
    """Tiles at most so many tiles away in time, and in rows and columns."""
    place = tiles.places()
    away_TT3 = (place[:, None] - place[None]).abs()
    mask_TT = (away_TT3[..., 0] <= frames) & (away_TT3[..., 1:] <= space).all(-1)
    return lambda q, k: mask_TT[None, None]


def by_mass(tiles: Tiles, density: float) -> Choose:
    """For each head and tile of queries the tiles of the highest estimated attention, and its own."""

    def choose(q_BLHK: Tensor, k_BLHK: Tensor) -> Tensor:
        scores_BHTT = tiles.mean(q_BLHK) @ tiles.mean(k_BLHK).transpose(-1, -2)
        own_TT = torch.eye(scores_BHTT.shape[-1], dtype=torch.bool)
        count = max(1, round(density * scores_BHTT.shape[-1]))
        best = scores_BHTT.masked_fill(own_TT, float("inf")).topk(count, dim=-1).indices
        return torch.zeros_like(scores_BHTT, dtype=torch.bool).scatter_(-1, best, True)

    return choose


@dataclass
class SparseAttention:
    """Self-attention of one pipeline's forwards in order, blocks of a forward in order."""

    tiles: Tiles
    choose: Choose
    blocks: int
    steps: int
    first_steps: int
    first_blocks: int
    calls: int = 0
    densities: list[float] = field(default_factory=list)  # of all calls, dense ones too

    def __call__(self, q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor) -> Tensor:
        """As `engine.attention.Attend`; all tokens on this rank, one forward a step."""
        block, step = self.calls % self.blocks, self.calls // self.blocks % self.steps
        self.calls += 1
        if step < self.first_steps or block < self.first_blocks:
            self.densities.append(1.0)
            return sdpa(q_BLHK, k_BLHK, v_BLHK)
        tile_L = self.tiles.of_tokens()
        mask_BHLL = self.choose(q_BLHK, k_BLHK)[..., tile_L, :][..., tile_L]
        self.densities.append(float(mask_BHLL.float().mean()))
        q, k, v = (x.transpose(1, 2) for x in (q_BLHK, k_BLHK, v_BLHK))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask_BHLL).transpose(1, 2)

    @property
    def saved(self) -> float:
        """The part of self-attention's two products that a kernel which skips tiles would not do."""
        return 1 - float(np.mean(self.densities))


def products_share(tokens: int) -> float:
    """The share of an A14B block's arithmetic that self-attention's two products are."""
    return tokens / (tokens + 2 * A14B.dim + A14B.dim + A14B.text_len + A14B.ffn_dim)


def row(trial: Trial, tiles: Tiles, choose: Choose, first_steps: int, first_blocks: int) -> dict[str, Any]:
    """One pattern's line: all captions under it, against their lossless clips."""
    pipeline = trial.maker.pipelines[LOSSLESS]
    dense = pipeline.sequence
    attend = SparseAttention(
        tiles, choose, pipeline.spec.dit.num_layers, pipeline.spec.sampling_steps, first_steps, first_blocks
    )
    pipeline.sequence = WholeSequence(attend, sdpa)
    try:
        pairs = zip(trial.prompts, trial.targets, strict=True)
        found = [psnr_db(trial.maker.clip(LOSSLESS, prompt, seed)[0], t) for (seed, prompt), t in pairs]
    finally:
        pipeline.sequence = dense
    return {
        "attention saved": round(attend.saved, 3),
        "of a block at A14B's size": round(attend.saved * products_share(TOKENS), 3),
        "psnr_db": round(float(np.mean(found)), 2),
        "psnr_db_worst": round(min(found), 2),
        "keeps the floor of 8bit-cache": bool(np.mean(found) >= FLOOR_DB[CACHED]),
    }


def main(argv: list[str] | None = None) -> None:
    """Make, compare, print."""
    parser = arguments(__doc__ or "", 6, "out/sparse.json")
    parser.add_argument("--first-steps", type=int, default=4, help="dense")
    parser.add_argument("--first-blocks", type=int, default=1, help="dense")
    parser.add_argument("--densities", default="0.75,0.5,0.25")
    args = parser.parse_args(argv)
    trial = trial_of(args, "cpu")
    spec = trial.maker.pipelines[LOSSLESS].spec
    patch, stride = spec.dit.patch_size, spec.vae.stride
    side = args.side // stride[1] // patch[1]
    tiles = Tiles(((args.frame_num - 1) // stride[0] + 1, side, side))
    patterns = {f"by mass, {d:.0%}": by_mass(tiles, d) for d in map(float, args.densities.split(","))}
    patterns |= {f"within {f} frames, {s} tiles": near(tiles, f, s) for f, s in ((2, 1), (1, 1), (4, 0))}
    found = {}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for name, choose in patterns.items():
        found[name] = row(trial, tiles, choose, args.first_steps, args.first_blocks)
        print(name, json.dumps(found[name]), flush=True)
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

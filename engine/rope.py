"""Rotary position tables over (frame, row, column), made once a shape.

Each head's features are split into three groups of interleaved pairs, one group an axis; with head
dimension 128 that is 44 for frames, 42 for rows, 42 for columns (RoFormer, arXiv:2104.09864, per axis;
the split and theta are the official Wan 2.2 model's).

Shapes: L tokens, K head dimension.
"""

from functools import lru_cache

import torch
from torch import Tensor

THETA = 10_000.0
TABLES = 5  # shapes whose tables are kept, whole, on every GPU: as many as a model serves


def axis_dims(head_dim: int) -> tuple[int, int, int]:
    """Features of a head given to (frame, row, column); each even, their sum is `head_dim`."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


@lru_cache(maxsize=TABLES)
def rope_table(grid: tuple[int, int, int], head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(cos, sin), each [L, K/2] fp32, of every token of a (frames, rows, columns) grid, frames outermost.

    Angles are computed in fp64, as the official code does, and stored in fp32. The table is never an
    inference tensor, so training and serving can share a process.
    """
    with torch.inference_mode(False):
        angles = []
        for axis, (size, dim) in enumerate(zip(grid, axis_dims(head_dim), strict=True)):
            frequency = THETA ** -(torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim)
            angle = torch.arange(size, dtype=torch.float64, device=device)[:, None] * frequency
            view = [1, 1, 1, dim // 2]
            view[axis] = size
            angles.append(angle.view(view).expand(*grid, dim // 2))
        angle_LK = torch.cat(angles, dim=-1).flatten(0, 2)
        return angle_LK.cos().float(), angle_LK.sin().float()

"""What a model's offered presets need on a GPU beside the lossless computation, for the memory plan."""

import torch

from engine.config import DiTConfig, ModelSpec


def preset_rows(
    spec: ModelSpec, tokens: int, branches: int, rows: int, dtype: torch.dtype
) -> list[tuple[str, int]]:
    """Rows of the plan, (name, bytes); none where lossless alone is offered.

    `tokens` are a rank's in the largest request, `branches` the guidance branches that it makes, of which
    `rows` at once.
    """
    offered = [preset for preset in spec.presets if not preset.refused]
    dim, ffn = spec.dit.dim, spec.dit.ffn_dim
    found: list[tuple[str, int]] = []
    if any(preset.reuse for preset in offered):
        found.append(("residuals kept from step to step", branches * tokens * dim * dtype.itemsize))
    if any(preset.eight_bit for preset in offered):
        # A block's operands, and its weights where they are quantised at each use.
        found.append(("8-bit operands", rows * tokens * (ffn + dim) + matrix_values(spec.dit)))
    return found


def matrix_values(config: DiTConfig) -> int:
    """Values of the matrices that a block in 8 bits has in 8 bits."""
    return 6 * config.dim**2 + 2 * config.dim * config.ffn_dim


def held_block_bytes(block: int, config: DiTConfig, dtype: torch.dtype) -> int:
    """Of a block of `block` bytes, what is left where its matrices are in 8 bits alone; scales included."""
    scales = 4 * (7 * config.dim + config.ffn_dim)
    return block - matrix_values(config) * (dtype.itemsize - 1) + scales

"""What a model's offered presets need on a GPU beside the lossless computation, for the memory plan."""

import torch

from engine.config import ModelSpec


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
        found.append(("8-bit operands", rows * tokens * (ffn + dim) + 6 * dim * dim + 2 * dim * ffn))
    return found

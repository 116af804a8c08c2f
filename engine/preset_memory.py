"""What a model's offered presets need on a GPU beside the lossless computation, for the memory plan."""

from dataclasses import replace

import torch

from engine.config import ModelSpec


def kept_attention_bytes(spec: ModelSpec, tokens: int, branches: int, dtype: torch.dtype) -> int:
    """What an offered preset keeps of every block's self-attention, of one expert at a time; 0 for none.

    `tokens` are a rank's in the largest request, `branches` the guidance branches that it makes. T2V-A14B at
    1280x720 x 81 frames on 8 GPUs: 40 blocks x 2 branches x 9,450 tokens x 5,120 x 2 bytes = 7.2 GiB.
    """
    offered = [preset.reuse for preset in spec.presets if preset.reuse and not preset.refused]
    if not any(reuse.attention_threshold for reuse in offered):
        return 0
    return spec.dit.num_layers * branches * tokens * spec.dit.dim * dtype.itemsize


def without_kept_attention(spec: ModelSpec, reason: str) -> ModelSpec:
    """The same model, refusing for this reason the presets that keep self-attention."""
    presets = tuple(
        replace(preset, refused=reason)
        if preset.reuse and preset.reuse.attention_threshold and not preset.refused
        else preset
        for preset in spec.presets
    )
    return replace(spec, presets=presets)


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

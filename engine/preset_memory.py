"""What a model's offered presets need on a GPU beside the lossless computation, for the memory plan."""

from dataclasses import replace

import torch

from engine.config import DiTConfig, ModelSpec
from engine.eight_bit_mode import kept_bytes
from engine.number_format import FORMATS
from engine.presets import E4M3, NVFP4

# Bytes a value at once in `kernels.nvfp4_gemm.reference`: two fp32 copies and a third's magnitude, the codes
# and a comparison, the source in half precision.
PASSES = 16


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
    forms = {preset.eight_bit.form for preset in offered if preset.eight_bit}
    if E4M3 in forms:
        # A block's operands, and its weights where they are quantised at each use.
        found.append(("8-bit operands", rows * tokens * (ffn + dim) + matrix_values(spec.dit)))
    if NVFP4 in forms:
        # Quantised by passes of plain torch in fp32, of activations or of the largest weight.
        values = max(rows * tokens, dim) * ffn
        weights = kept_bytes(replace(spec.dit, num_layers=1), FORMATS[NVFP4])
        found.append(("4-bit operands and the passes that make them", PASSES * values + weights))
    return found


def matrix_values(config: DiTConfig) -> int:
    """Values of the matrices that a block in 8 bits has in 8 bits."""
    return 6 * config.dim**2 + 2 * config.dim * config.ffn_dim


def held_block_bytes(block: int, config: DiTConfig, dtype: torch.dtype) -> int:
    """Of a block of `block` bytes, what is left where its matrices are in 8 bits alone; scales included."""
    return block - matrix_values(config) * dtype.itemsize + kept_bytes(replace(config, num_layers=1))

"""The tuner's part for the VAE's convolutions over three frames: as they are, or flat over spread frames.

What is timed includes the pass that writes the convolution's input, as a flat one wants three times as much.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks._measure import burst
from benchmarks._tune_attention import randn
from benchmarks._tune_passes import RIGHT, VAE_SHAPES

# (inputs, outputs) -> frames, rows, columns: of Wan2.1's VAE at 1280x720 and of Wan2.2's at 1280x704.
FLAT_SHAPES = {(channels, channels): shape for channels, shape in VAE_SHAPES.items()}
FLAT_SHAPES |= {(192, 384): VAE_SHAPES[384], (512, 256): VAE_SHAPES[256], (1024, 512): VAE_SHAPES[512]}
FLAT_SHAPES |= {(1024, 1024): (2, 88, 160)}
LEAST = 0.98  # of the usual way's time: bursts differ by 1 to 2 % from run to run


def tune_flat() -> dict[str, Any]:
    """Entries by "inputs outputs": whether flat won, and both ways' milliseconds."""
    entries = {}
    for (inputs, outputs), shape in FLAT_SHAPES.items():
        ways = both_ways(inputs, outputs, *shape)
        want = ways["usual"]().float()
        error = float((ways["flat"]().float() - want).norm() / want.norm())
        times = {f"{name}_ms": round(burst(call), 4) for name, call in ways.items()}
        won = error < RIGHT and times["flat_ms"] < LEAST * times["usual_ms"]
        entries[f"{inputs} {outputs}"] = {"flat": won} | times
        print(f"vae_flat {inputs} {outputs}: {times}, error {error:.2g}", file=sys.stderr, flush=True)
    return entries


def both_ways(
    inputs: int, outputs: int, frames: int, height: int, width: int
) -> dict[str, Callable[[], Tensor]]:
    """Norm, SiLU, the frames before in front, and the convolution: [1, O, T, H, W] by either."""
    from kernels.vae_norm_silu import triton

    last = torch.channels_last_3d
    x = randn(1, inputs, frames, height, width).half().contiguous(memory_format=last)
    zeros = x.new_zeros(1, inputs, 2, height, width).contiguous(memory_format=last)
    gamma = randn(inputs).half()
    weight = (randn(outputs, inputs, 3, 3, 3) / (27 * inputs) ** 0.5).half()
    flat = weight.transpose(1, 2).flatten(1, 2).contiguous(memory_format=torch.channels_last)
    weight = weight.contiguous(memory_format=last)
    joined = x.new_empty(1, inputs, frames + 2, height, width).contiguous(memory_format=last)
    spread = x.new_empty(1, 3 * inputs, frames, height, width).contiguous(memory_format=last)
    rest = (None, None, gamma, True, False)
    past, other = zeros.clone(), zeros.clone()  # each way keeps the last frames of its own

    def usual() -> Tensor:
        triton.join(x, joined, past, *rest)
        return F.conv3d(joined, weight, padding=(0, 1, 1))

    def over_spread() -> Tensor:
        triton.join(x, spread, other, *rest)
        return (
            F.conv2d(spread.transpose(1, 2).flatten(0, 1), flat, padding=1)
            .unflatten(0, (1, frames))
            .transpose(1, 2)
        )

    return {"usual": usual, "flat": over_spread}

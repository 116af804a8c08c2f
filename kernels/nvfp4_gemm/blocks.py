"""What a product in NVFP4 works on: packed e2m1 values, a scale a block of 16 features, a scale a row.

NVIDIA's definition (cuBLAS documentation, "Narrow Precision Data Types Usage", scale mode VEC16_UE4M3;
"Pretraining Large Language Models with NVFP4", arXiv 2509.25149): a value is e2m1, one of 0, 0.5, 1, 1.5, 2,
3, 4, 6 with a sign; 16 neighbours along K share an e4m3 scale; over that stands an fp32 scale, the largest
magnitude / (6 * 448), so that the largest block's scale is e4m3's largest. That fp32 scale is a tensor's for
weights and a token's for activations, so a token's numbers depend on no other token: they are the same
however tokens are spread over ranks and guidance passes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.fp8_gemm.rows import decode

BLOCK = 16  # features that share a scale
LARGEST = 6.0  # of e2m1
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of codes 0 to 7; code + 8 is the negative


@dataclass(frozen=True)
class Blocks:
    """x = e2m1 * scale * outer: activations, or a weight."""

    data: Tensor  # [..., K / 2] uint8: two codes a byte, the even feature in the low half
    scale: Tensor  # [..., K / 16] e4m3, never negative; NaN where the row was not finite
    outer: Tensor  # [...] fp32: the largest magnitude of the row, or of its whole weight, / (6 * 448)

    @property
    def width(self) -> int:
        """K, the features that a product sums over."""
        return 2 * self.data.shape[-1]

    def rows(self, part: slice) -> "Blocks":
        """Some of a weight's output channels; a view."""
        return Blocks(self.data[part], self.scale[part], self.outer[part])

    def inner(self) -> Tensor:
        """The values over their row's outer scale, fp32, exact: e2m1 and e4m3 have 6 bits together."""
        values = torch.unflatten(unpack(self.data), -1, (-1, BLOCK))
        return (values * decode(self.scale)[..., None]).flatten(-2)

    def float(self) -> Tensor:
        """The values, fp32."""
        return self.inner() * self.outer[..., None]


def join(weights: Sequence[Blocks]) -> Blocks:
    """Weights of the same width one under another; each keeps its tensor's scale."""
    # Bytes, as not every build of torch joins e4m3.
    scale = torch.cat([weight.scale.view(torch.uint8) for weight in weights]).view(weights[0].scale.dtype)
    return Blocks(
        torch.cat([weight.data for weight in weights]), scale, torch.cat([weight.outer for weight in weights])
    )


def pack(codes: Tensor) -> Tensor:
    """Codes [..., K] uint8, 0 to 15, as [..., K / 2]: torch.float4_e2m1fn_x2's order, the even one low."""
    return codes[..., 0::2] | codes[..., 1::2] << 4


def unpack(data: Tensor) -> Tensor:
    """[..., K / 2] bytes as the e2m1 values [..., K], fp32."""
    return F.embedding(data.int(), _pairs(data.device)).flatten(-2)


@cache
def _pairs(device: torch.device) -> Tensor:
    """The two values of each byte, [256, 2]."""
    with torch.inference_mode(False):
        values = torch.tensor(MAGNITUDES + tuple(-value for value in MAGNITUDES))
        byte = torch.arange(256)
        return torch.stack([values[byte & 15], values[byte >> 4]], dim=-1).to(device)

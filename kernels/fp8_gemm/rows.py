"""What a product in 8 bits works on: e4m3 values with one fp32 scale a row."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3


@dataclass(frozen=True)
class Rows:
    """x = data * scale: activations with a scale a token, or a weight with a scale an output channel."""

    data: Tensor  # [..., K] e4m3, contiguous
    scale: Tensor  # [...] fp32, the row's largest magnitude / 448 (1 for a row of zeros)

    @property
    def width(self) -> int:
        """K, the features that a product sums over."""
        return self.data.shape[-1]

    def rows(self, part: slice) -> "Rows":
        """Some of a weight's output channels; a view."""
        return Rows(self.data[part], self.scale[part])

    def float(self) -> Tensor:
        """The values, fp32."""
        return decode(self.data) * self.scale[..., None]


def join(weights: Sequence[Rows]) -> Rows:
    """Weights of the same width one under another."""
    # Bytes, as not every build of torch joins e4m3.
    data = torch.cat([weight.data.view(torch.uint8) for weight in weights]).view(weights[0].data.dtype)
    return Rows(data, torch.cat([weight.scale for weight in weights]))


def decode(data: Tensor) -> Tensor:
    """e4m3 as fp32. On a CPU by the bits, which takes a quarter of torch's own conversion's time."""
    if data.is_cuda or data.dtype != E4M3:
        return data.float()
    bits = data.view(torch.uint8).to(torch.int32)
    # The exponent's bias is 7 instead of 127, so fp32 reads the same bits as 2^-120 of the value.
    value = ((bits & 0x7F) << 20 | (bits & 0x80) << 24).view(torch.float32) * 2.0**120
    return value.masked_fill_(bits & 0x7F == 0x7F, torch.nan)

"""The numbers that a block may compute its products in: what a format must offer, and which there are.

A format is a module of `kernels`: `fp8_gemm` (e4m3, a scale a row) or `nvfp4_gemm` (e2m1, a scale a block of
16). `engine.eight_bit` runs a block in any of them.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol, Self, TypeVar

import torch
from torch import Tensor

from engine.presets import E4M3, NVFP4
from kernels import fp8_gemm, nvfp4_gemm
from kernels.norm_modulate import Norm

T = TypeVar("T")  # the format's operand


class Operand(Protocol):
    """Quantised activations [..., K] or a weight [N, K]."""

    @property
    def data(self) -> Tensor:
        """The values as they are stored; all dimensions but the last are the operand's."""

    @property
    def width(self) -> int:
        """K, the features that a product sums over."""

    def rows(self, part: slice) -> Self:
        """Some of a weight's output channels; a view."""


class Format(Protocol[T]):
    """Quantising passes and the product; shapes as in `kernels.fp8_gemm`."""

    NAME: str

    def quantize_rows(self, x: Tensor, /) -> T:
        """Activations [..., K]."""

    def quantize_weight(self, weight_NK: Tensor, /) -> T:
        """A weight."""

    def join(self, weights: Sequence[T], /) -> T:
        """Weights of the same width one under another."""

    def stored_bytes(self, rows: int, width: int, /) -> int:
        """Memory of a quantised [rows, width], scales included."""

    def gelu_quantize(self, x_BLN: Tensor, /) -> T:
        """gelu(x), the tanh form."""

    def normalize(self, x_BLD: Tensor, norm: Norm, /) -> T:
        """LN(x) * (offset + scale) + shift."""

    def add_normalize(
        self, x_BLD: Tensor, y_BLD: Tensor, gate_BSD: Tensor | None, norm: Norm, /
    ) -> tuple[Tensor, T]:
        """(x + y * gate in x's dtype, its norm)."""

    def linear(self, x: T, weight: T, bias_N: Tensor | None, dtype: torch.dtype, /) -> Tensor:
        """x W^T + bias, [..., N] as `dtype`."""


FORMATS: Final[Mapping[str, Format[Any]]] = {E4M3: fp8_gemm, NVFP4: nvfp4_gemm}

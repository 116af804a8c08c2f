"""Products in 8 bits as plain torch computes them: quantise, multiply in fp32, scale.

That is exact up to the order of fp32 sums: e4m3 products are exact in fp32. A GPU's fast accumulation keeps
fewer bits of partial sums, so it may differ from this by a little more.

Shapes: B batch, L tokens, K features in, N features out, D model width, S timestep sets.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.fp8_gemm.rows import E4M3, LARGEST, Rows, decode
from kernels.norm_modulate import Norm
from kernels.norm_modulate.reference import add_gated
from kernels.norm_modulate.reference import normalize as plain_normalize


def quantize_rows(x: Tensor) -> Rows:
    """Each row of x [..., K] over its largest magnitude, rounded to the nearest e4m3."""
    x = x.float()
    largest = x.abs().amax(-1)
    scale = largest / LARGEST
    scale = torch.where(scale == 0, 1.0, scale)  # also of a row whose largest is a denormal
    return Rows((x / scale[..., None]).clamp(-LARGEST, LARGEST).to(E4M3), scale)


def linear(x: Rows, weight: Rows, bias_N: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x W^T + bias, [..., N] as `dtype`, rounded once."""
    product = decode(x.data) @ decode(weight.data).t() * x.scale[..., None] * weight.scale
    return (product if bias_N is None else product + bias_N.float()).to(dtype)


def gelu_quantize(x_BLN: Tensor) -> Rows:
    """gelu(x), the tanh form in fp32, quantised by rows."""
    return quantize_rows(F.gelu(x_BLN.float(), approximate="tanh"))


def normalize(x_BLD: Tensor, norm: Norm) -> Rows:
    """LN(x) * (offset + scale) + shift, quantised by rows."""
    return quantize_rows(plain_normalize(x_BLD, norm, torch.float32))


def add_normalize(x_BLD: Tensor, y_BLD: Tensor, gate_BSD: Tensor | None, norm: Norm) -> tuple[Tensor, Rows]:
    """(x + y * gate in x's dtype, its norm quantised by rows)."""
    x_BLD = add_gated(x_BLD, y_BLD, gate_BSD, norm.split)
    return x_BLD, normalize(x_BLD, norm)

"""Products in NVFP4 as plain torch computes them, on any device: quantise, multiply in fp32, scale.

This is the exact emulation. Quantising rounds to nearest, ties to even, in IEEE fp32 alone, so a CPU and a
GPU give the same bits. A product of two quantised values over their outer scales has 12 bits at most, so it
is exact in fp32 (and its factors are in TF32); only the order of fp32 sums is free.

What isn't finite has no e2m1: a row (of a weight: the whole weight) with a NaN or an infinity becomes NaN,
and so does all that is computed from it.

Shapes: L tokens, K features in, N features out, D model width, S timestep sets.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import norm_modulate
from kernels.fp8_gemm.rows import E4M3
from kernels.fp8_gemm.rows import LARGEST as LARGEST_SCALE
from kernels.norm_modulate import Norm
from kernels.nvfp4_gemm.blocks import BLOCK, LARGEST, Blocks, pack

# Between neighbours of e2m1; a tie goes to the even code, so up from the odd ones.
EDGES = ((0.25, False), (0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True), (5.0, False))
SMALLEST = 2.0**-126  # a smaller outer scale would lose bits of its own


def quantize_rows(x: Tensor) -> Blocks:
    """Activations [..., K], each row over its own largest magnitude. K must be a multiple of 16."""
    x = x.float()
    return _quantize(x, _outer(x.abs().amax(-1)))


def quantize_weight(weight_NK: Tensor) -> Blocks:
    """A weight over its one largest magnitude, which each of its rows gets as its outer scale."""
    weight_NK = weight_NK.float()
    outer = _outer(weight_NK.abs().amax())
    return _quantize(weight_NK, outer.expand(weight_NK.shape[0]).contiguous())


def linear(x: Blocks, weight: Blocks, bias_N: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x W^T + bias, [..., N] as `dtype`, rounded once."""
    product = x.inner() @ weight.inner().t()
    return scaled(product, x.outer, weight.outer, bias_N).to(dtype)


def scaled(product: Tensor, rows: Tensor, columns_N: Tensor, bias_N: Tensor | None) -> Tensor:
    """The product of inner values [..., N] times both outer scales, plus the bias, fp32."""
    product = product.float() * rows.unsqueeze(-1) * columns_N
    return product if bias_N is None else product + bias_N.float()


def gelu_quantize(x_BLN: Tensor) -> Blocks:
    """gelu(x), the tanh form in fp32, quantised by rows."""
    return quantize_rows(F.gelu(x_BLN.float(), approximate="tanh"))


def normalize(x_BLD: Tensor, norm: Norm) -> Blocks:
    """LN(x) * (offset + scale) + shift, quantised by rows."""
    return quantize_rows(norm_modulate.normalize(x_BLD, norm, torch.float32))


def add_normalize(x_BLD: Tensor, y_BLD: Tensor, gate_BSD: Tensor | None, norm: Norm) -> tuple[Tensor, Blocks]:
    """(x + y * gate in x's dtype, its norm quantised by rows)."""
    x_BLD, normed_BLD = norm_modulate.add_normalize(x_BLD, y_BLD, gate_BSD, norm, torch.float32)
    return x_BLD, quantize_rows(normed_BLD)


def round_e2m1(x: Tensor) -> Tensor:
    """Codes 0 to 15 of the nearest e2m1, uint8: ties to even, beyond 6 it stays 6, NaN gives 0."""
    magnitude = x.abs()
    codes = torch.zeros_like(magnitude, dtype=torch.uint8)
    for edge, up in EDGES:
        codes += magnitude >= edge if up else magnitude > edge
    negative = x.signbit() & (codes > 0)  # zero has no sign here
    return codes | negative.to(torch.uint8) << 3


def _outer(largest: Tensor) -> Tensor:
    """The outer scale for a largest magnitude; NaN for what isn't finite, 1 for zeros."""
    # By a tensor: on CUDA a number would become a multiplication with its rounded inverse.
    scale = (largest / largest.new_full((), LARGEST * LARGEST_SCALE)).clamp_min(SMALLEST)
    scale = torch.where(largest > 0, scale, torch.ones_like(scale))
    return torch.where(largest.isfinite(), scale, torch.full_like(scale, torch.nan))


def _quantize(x: Tensor, outer: Tensor) -> Blocks:
    """x [..., K] fp32 under its outer scales [...]."""
    width = x.shape[-1]
    if width % BLOCK:
        raise ValueError(f"NVFP4 scales blocks of {BLOCK} features: {width} is no multiple of it")
    blocks = torch.unflatten(x, -1, (width // BLOCK, BLOCK))
    scale = blocks.abs().amax(-1) / (outer * LARGEST)[..., None]
    scale = scale.clamp_max(LARGEST_SCALE).abs().to(E4M3)  # abs: one NaN on every device, the positive one
    step = (scale.float() * outer[..., None])[..., None]
    # A block whose scale rounds to zero is zero, whatever its codes.
    codes = round_e2m1((blocks / step).masked_fill_(~(step > 0), 0.0))
    return Blocks(pack(codes.flatten(-2)), scale, outer)

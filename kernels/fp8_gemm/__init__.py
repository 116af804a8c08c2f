"""Matrix products in 8 bits: e4m3 operands, a scale a token and a scale an output channel.

On CUDA the product is cuBLASLt's (`torch._scaled_mm`, row-wise scales, compute capability 9.0 and up) and
Triton makes its operands; elsewhere torch emulates both. Shapes as in `kernels.fp8_gemm.reference`.
"""

import torch
from torch import Tensor

from kernels.fp8_gemm import reference
from kernels.fp8_gemm.rows import Rows, join
from kernels.norm_modulate import Norm

__all__ = [
    "NAME", "Rows", "add_normalize", "gelu_quantize", "join", "linear", "normalize", "quantize_rows",
    "quantize_weight", "stored_bytes",
]  # fmt: skip
NAME = "8-bit"


def quantize_rows(x: Tensor) -> Rows:
    """Each row of x [..., K] over its largest magnitude, as e4m3: activations, or a weight [N, K]."""
    if x.is_cuda:
        from kernels.fp8_gemm import triton

        return triton.quantize_rows(x)
    return reference.quantize_rows(x)


def quantize_weight(weight_NK: Tensor) -> Rows:
    """A weight with a scale an output channel."""
    return quantize_rows(weight_NK)


def stored_bytes(rows: int, width: int) -> int:
    """Memory of a quantised [rows, width], scales included."""
    return rows * (width + 4)


def gelu_quantize(x_BLN: Tensor) -> Rows:
    """gelu(x), the tanh form, quantised by rows."""
    if x_BLN.is_cuda:
        from kernels.fp8_gemm import triton

        return triton.gelu_quantize(x_BLN)
    return reference.gelu_quantize(x_BLN)


def normalize(x_BLD: Tensor, norm: Norm) -> Rows:
    """LN(x) * (offset + scale) + shift, quantised by rows."""
    if x_BLD.is_cuda:
        from kernels.fp8_gemm import triton

        return triton.normalize(x_BLD, norm)
    return reference.normalize(x_BLD, norm)


def add_normalize(x_BLD: Tensor, y_BLD: Tensor, gate_BSD: Tensor | None, norm: Norm) -> tuple[Tensor, Rows]:
    """(x + y * gate in x's dtype, its norm quantised by rows): a branch joins the residual stream."""
    if x_BLD.is_cuda:
        from kernels.fp8_gemm import triton

        return triton.add_normalize(x_BLD, y_BLD, gate_BSD, norm)
    return reference.add_normalize(x_BLD, y_BLD, gate_BSD, norm)


def linear(x: Rows, weight: Rows, bias_N: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x W^T + bias, [..., N] as `dtype` (bf16 on CUDA). N and K must be multiples of 16 on CUDA."""
    if not x.data.is_cuda:
        return reference.linear(x, weight, bias_N, dtype)
    out: Tensor = torch._scaled_mm(
        x.data.reshape(-1, x.width),
        weight.data.t(),  # [K, N] with K contiguous, as the library wants it
        scale_a=x.scale.reshape(-1, 1),
        scale_b=weight.scale.view(1, -1),
        bias=bias_N,
        out_dtype=dtype,
        use_fast_accum=True,
    )
    return out.view(*x.data.shape[:-1], -1)

"""Matrix products with bias, bias + tanh-GELU, or bias + gate + residual.

On CUDA the device's tuning table says, by shape, whether our Triton kernel or the library (cuBLAS) is
used; a shape that the table lacks goes to the library. On a CPU torch does it.
"""

from typing import Any

import torch
from torch import Tensor

from kernels import tables
from kernels.gemm import reference

__all__ = ["add_product", "linear", "linear_gated", "linear_gelu", "table_key"]

LIBRARY: dict[str, Any] = {"backend": "library"}


def table_key(epilogue: str, rows: int, n: int, k: int) -> str:
    """The tuning table's key of a product: epilogue, rows rounded up to a power of two, N and K."""
    bucket = 1 << max(rows - 1, 1).bit_length()
    return f"{epilogue} {bucket}x{n}x{k}"


def _choice(epilogue: str, x_BLK: Tensor, weight_NK: Tensor) -> dict[str, Any]:
    if not x_BLK.is_cuda or x_BLK.dtype not in (torch.bfloat16, torch.float16):
        return LIBRARY
    n, k = weight_NK.shape
    key = table_key(epilogue, x_BLK.numel() // k, n, k)
    return tables.setting("gemm", key, x_BLK.device, LIBRARY)


def _ours(
    choice: dict[str, Any],
    x_BLK: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None,
    epilogue: int,
    residual_BLN: Tensor | None = None,
    gate_BSN: Tensor | None = None,
    split: int = 0,
) -> Tensor | None:
    """Our kernel's product where it is the choice and can take these operands, else None."""
    if choice["backend"] != "triton":
        return None
    from kernels.gemm import triton

    if not triton.fits(x_BLK, weight_NK, residual_BLN, gate_BSN):
        return None
    tile = triton.Tile(**choice["tile"])
    return triton.product(x_BLK, weight_NK, bias_N, epilogue, tile, residual_BLN, gate_BSN, split)


def linear(x_BLK: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    """x W^T + bias, [B, L, N] in x's dtype."""
    out = _ours(_choice("bias", x_BLK, weight_NK), x_BLK, weight_NK, bias_N, 0)
    return reference.linear(x_BLK, weight_NK, bias_N) if out is None else out


def linear_gelu(x_BLK: Tensor, weight_NK: Tensor, bias_N: Tensor) -> Tensor:
    """gelu(x W^T + bias), the tanh form, [B, L, N] in x's dtype."""
    out = _ours(_choice("gelu", x_BLK, weight_NK), x_BLK, weight_NK, bias_N, 1)
    if out is not None:
        return out
    if (x_BLK.is_cuda or x_BLK.is_meta) and x_BLK.dtype in (torch.bfloat16, torch.float16):
        return reference.library_gelu(x_BLK, weight_NK, bias_N)
    return reference.linear_gelu(x_BLK, weight_NK, bias_N)


def linear_gated(
    x_BLK: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None,
    residual_BLN: Tensor,
    gate_BSN: Tensor | None,
    split: int = 0,
) -> Tensor:
    """residual + (x W^T + bias) * gate, [B, L, N] in the residual's dtype (the seed's multiply_add)."""
    choice = _choice("gated", x_BLK, weight_NK)
    out = _ours(choice, x_BLK, weight_NK, bias_N, 2, residual_BLN, gate_BSN, split)
    if out is not None:
        return out
    return reference.linear_gated(x_BLK, weight_NK, bias_N, residual_BLN, gate_BSN, split)


def add_product(total_MN: Tensor | None, x_MK: Tensor, weight_NK: Tensor) -> Tensor:
    """total + x W^T, [M, N] in fp32: a product whose K comes in parts. None for the first part's total."""
    return reference.add_product(total_MN, x_MK, weight_NK)

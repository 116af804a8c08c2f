"""Matrix products with their epilogues in plain torch.

Shapes: B batch, L tokens, K features in, N features out, S timestep sets.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.norm_modulate.reference import add_gated


def linear(x_BLK: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    """x W^T + bias."""
    return F.linear(x_BLK, weight_NK, bias_N)


def linear_gelu(x_BLK: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    """gelu(x W^T + bias), the tanh form."""
    return F.gelu(F.linear(x_BLK, weight_NK, bias_N), approximate="tanh")


def linear_gated(
    x_BLK: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None,
    residual_BLN: Tensor,
    gate_BSN: Tensor | None,
    split: int,
) -> Tensor:
    """residual + (x W^T + bias) * gate, in the residual's dtype; gate 1 when None."""
    return add_gated(residual_BLN, F.linear(x_BLK, weight_NK, bias_N), gate_BSN, split)


def library_gelu(x_BLK: Tensor, weight_NK: Tensor, bias_N: Tensor) -> Tensor:
    """gelu(x W^T + bias) with cuBLASLt's own epilogue (its GELU is the tanh form), on CUDA."""
    flat = x_BLK.flatten(0, -2)
    out: Tensor = torch._addmm_activation(bias_N, flat, weight_NK.t(), use_gelu=True)
    return out.view(*x_BLK.shape[:-1], -1)


def add_product(total_MN: Tensor | None, x_MK: Tensor, weight_NK: Tensor) -> Tensor:
    """total + x W^T in fp32, by cuBLAS with fp32 results of half-precision operands on CUDA."""
    if not x_MK.is_cuda or x_MK.dtype == torch.float32:
        product = x_MK.float() @ weight_NK.float().t()
        return product if total_MN is None else total_MN + product
    if total_MN is None:
        return torch.mm(x_MK, weight_NK.t(), out_dtype=torch.float32)
    return torch.addmm(total_MN, x_MK, weight_NK.t(), out_dtype=torch.float32)

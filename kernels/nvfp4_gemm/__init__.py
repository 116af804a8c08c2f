"""Matrix products in NVFP4: e2m1 operands, a scale a block of 16, a scale a token and a weight.

On Blackwell the product is cuBLASLt's, a path that could never be run (`kernels.nvfp4_gemm.blackwell`);
everywhere else, other GPUs included, torch emulates it exactly. The passes before the products are plain
torch on every device. Shapes as in `kernels.nvfp4_gemm.reference`.
"""

import torch
from torch import Tensor

from kernels.nvfp4_gemm import reference
from kernels.nvfp4_gemm.blackwell import native
from kernels.nvfp4_gemm.blocks import BLOCK, Blocks, join
from kernels.nvfp4_gemm.reference import (
    add_normalize,
    gelu_quantize,
    normalize,
    quantize_rows,
    quantize_weight,
)

__all__ = [
    "NAME", "Blocks", "add_normalize", "gelu_quantize", "join", "linear", "native", "normalize",
    "quantize_rows", "quantize_weight", "stored_bytes",
]  # fmt: skip
NAME = "4-bit"


def linear(x: Blocks, weight: Blocks, bias_N: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x W^T + bias, [..., N] as `dtype`, sums in fp32."""
    if native(x.data.device):
        from kernels.nvfp4_gemm import blackwell

        return blackwell.linear(x, weight, bias_N, dtype)
    return reference.linear(x, weight, bias_N, dtype)


def stored_bytes(rows: int, width: int) -> int:
    """Memory of a quantised [rows, width], scales included."""
    return rows * (width // 2 + width // BLOCK + 4)

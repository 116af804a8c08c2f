"""Products in NVFP4 on Blackwell's tensor cores, by cuBLASLt. NEVER RUN: no such GPU was at hand.

What was checked without one: the order of the scales and of the packed values against the published formulas,
and each call's shapes, strides and dtypes by torch's own checks of `torch._scaled_mm`
(`tests/kernels/test_nvfp4_native.py`). Neither its speed nor that cuBLASLt takes it is known.

The operands are made by plain torch passes (`kernels.nvfp4_gemm.reference`); fusing them into the norms, the
GELU and the scales' order is left to whoever has the GPU to measure it on.
"""

import torch
from torch import Tensor

from kernels.nvfp4_gemm.blocks import Blocks
from kernels.nvfp4_gemm.layout import swizzle
from kernels.nvfp4_gemm.reference import scaled

CAPABILITY = (10, 0)  # the first whose tensor cores multiply e2m1 in block scales
TOOLKIT = (12, 8)  # the first CUDA whose cuBLASLt has the scale mode VEC16_UE4M3


def native(device: torch.device) -> bool:
    """Whether products there run on tensor cores: the GPU's capability and this build of torch."""
    if device.type != "cuda" or torch.version.cuda is None or not hasattr(torch, "float4_e2m1fn_x2"):
        return False
    toolkit = tuple(int(part) for part in torch.version.cuda.split(".")[:2])
    return toolkit >= TOOLKIT and torch.cuda.get_device_capability(device) >= CAPABILITY


def linear(x: Blocks, weight: Blocks, bias_N: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x W^T + bias, [..., N] as `dtype`. K must be a multiple of 32, N of 16. Never run: see above.

    cuBLASLt knows one outer scale a matrix; ours are a row's, so they come afterwards: the product of inner
    values is rounded to bf16, scaled and biased in fp32 and rounded once more.
    """
    packed = torch.float4_e2m1fn_x2
    product: Tensor = torch._scaled_mm(
        x.data.reshape(-1, x.data.shape[-1]).view(packed),
        weight.data.view(packed).t(),  # [K, N] with K contiguous, as the library wants it
        scale_a=swizzle(x.scale.reshape(-1, x.scale.shape[-1])),
        scale_b=swizzle(weight.scale),
        out_dtype=torch.bfloat16,
    )
    product = product.view(*x.data.shape[:-1], -1)
    return scaled(product, x.outer, weight.outer, bias_N).to(dtype)

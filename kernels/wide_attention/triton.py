# Triton kernels carry no annotations; the launchers below them do.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""Attention as two library products with a row kernel between them, a block of queries at a time.

A block's fp32 scores are small enough to stay in L2. The row kernel turns them into exp(score - maximum) in
half precision and their fp32 sum; the sum divides the second product's fp32 result, so that no probability
has to be as small as one part in all keys.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gemm.reference import add_product

LONGEST = 32768  # keys that one program holds
SCORES = 16 << 20  # of one block of queries: 64 MB


@triton.jit  # rows of 16s of keys get wide loads
def _exp_rows_kernel(scores_ptr, out_ptr, sum_ptr, length, scale, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    valid = column < length
    x = tl.load(scores_ptr + row * length + column, mask=valid, other=-float("inf"))
    # What is summed is what the product will see: the rounded values.
    y = tl.exp((x - tl.max(x, axis=0)) * scale).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * length + column, y, mask=valid)
    tl.store(sum_ptr + row, tl.sum(tl.where(valid, y.to(tl.float32), 0.0), axis=0))


def fits(k_BHTK: Tensor) -> bool:
    """Whether so many keys can be held by one program."""
    return 0 < k_BHTK.shape[2] <= LONGEST


def exp_rows(scores_RT: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(exp(scale * (score - the row's largest)) as `dtype` [R, T], their sum [R] fp32) of fp32 scores."""
    rows, length = scores_RT.shape
    out = torch.empty((rows, length), dtype=dtype, device=scores_RT.device)
    total = torch.empty(rows, dtype=torch.float32, device=scores_RT.device)
    block = triton.next_power_of_2(length)
    warps = min(max(block // 1024, 1), 16)
    _exp_rows_kernel[(rows,)](scores_RT.contiguous(), out, total, length, scale, BLOCK=block, num_warps=warps)
    return out, total


def attention(q_BHLK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K)) v, [B, H, L, K] in q's dtype."""
    if not fits(k_BHTK):
        raise ValueError(f"{k_BHTK.shape[2]} keys: expected 1 to {LONGEST}")
    out = torch.empty(q_BHLK.shape, dtype=q_BHLK.dtype, device=q_BHLK.device)
    rows = max(SCORES // k_BHTK.shape[2] // 128 * 128, 128)
    scale = q_BHLK.shape[-1] ** -0.5
    for place in ((b, h) for b in range(q_BHLK.shape[0]) for h in range(q_BHLK.shape[1])):
        k_TK, v_TK = k_BHTK[place], v_BHTK[place]
        for q_RK, out_RK in zip(q_BHLK[place].split(rows), out[place].split(rows), strict=True):
            weights, total = exp_rows(add_product(None, q_RK, k_TK), scale, q_RK.dtype)
            product = add_product(None, weights, v_TK.t())
            torch.div(product, total[:, None], out=product)
            out_RK.copy_(product)
    return out

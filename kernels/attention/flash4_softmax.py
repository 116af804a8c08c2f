# CuTe code is traced, not typed, and the packages are there on GPU machines only.
# mypy: ignore-errors
"""flash-attn-4's Hopper kernel with a softmax that costs less power. Power, not time, is its limit.

Online softmax scales the output so far by exp(old maximum - new maximum) at each block of keys. Over a long
sequence the maximum soon stops moving, so nearly all those products are by exactly 1.

- "lazy" leaves them out, which changes no bit. The library's kernel for Blackwell does so already. The warp
  votes, so that no lane diverges.
- "settled" doesn't look for the maximum any more either. Softmax is the same whatever is subtracted from a
  row's scores, as long as nothing leaves fp32's and bf16's range, so a row takes the maximum of its first
  block of keys (less BIAS, as there is more room above than below), and a new one only where its sum has
  grown past 1. One number may be subtracted for all after FlashDecoding++ (arXiv:2311.01282). A block whose
  e^score are e^60 times all of the row's before them is beyond that range: the row is NaN then, never a
  wrong number, and `kernels.attention.settled` says what to do. For bf16 alone: fp16 has no such range.
"""

import math
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

import cutlass
import cutlass.cute as cute
from cutlass import Float32
from flash_attn.cute import interface, softmax, utils
from flash_attn.cute.cache_utils import JITCache
from quack import layout_utils

from kernels.attention.reference import BIAS, LARGEST_SUM, LIMIT

_own = softmax.Softmax


@cute.jit
def _rescale(self, acc_O: cute.Tensor, row_scale: cute.Tensor) -> None:
    """Scale each row of acc_O, unless every row of the warp has scale 1."""
    moved = row_scale[0] != 1.0
    for r in cutlass.range_constexpr(1, cute.size(row_scale)):
        moved = moved or row_scale[r] != 1.0
    if cute.arch.vote_ballot_sync(moved) != 0:
        acc_O_mn = layout_utils.reshape_acc_to_mn(acc_O)
        for r in cutlass.range(cute.size(row_scale), unroll_full=True):
            acc_O_mn[r, None].store(acc_O_mn[r, None].load() * row_scale[r])


@cute.jit
def _settled_softmax(
    self,
    acc_S: cute.Tensor,
    is_first: cutlass.Constexpr[bool] = False,
    check_inf: cutlass.Constexpr[bool] = True,
) -> cute.Tensor:
    """acc_S becomes P; returns what the output so far is to be scaled by.

    A row's new maximum is found from its sum up to the block before, which is what the output holds by the
    time that it is scaled.
    """
    row_max, row_sum, scale_log2, arch = self.row_max, self.row_sum, self.scale_log2, self.arch
    acc_S_mn = layout_utils.reshape_acc_to_mn(acc_S)
    row_scale = cute.make_fragment_like(row_max, Float32)
    row_scale.fill(1.0)
    if cutlass.const_expr(is_first):
        for r in cutlass.range(cute.size(row_max), unroll_full=True):
            top = utils.fmax_reduce(acc_S_mn[r, None].load(), arch=arch)
            row_max[r] = cute.arch.warp_reduction_max(top, threads_in_group=4) + BIAS / scale_log2
    else:
        largest = row_sum[0]
        for r in cutlass.range_constexpr(1, cute.size(row_sum)):
            largest = utils.fmax(largest, row_sum[r])
        if cute.arch.vote_ballot_sync(largest > LIMIT) != 0:
            for r in cutlass.range(cute.size(row_max), unroll_full=True):
                # The row's four lanes must agree: each holds some of its scores, but sums of all in acc_O.
                top = cute.arch.warp_reduction_max(row_sum[r], threads_in_group=4)
                shift = cute.math.log2(top, fastmath=True) + BIAS if top > LIMIT else Float32(0.0)
                # Beyond it exp2 is 0: all so far would be forgotten and the blocks to come pass for the row.
                row_scale[r] = (
                    cute.math.exp2(-shift, fastmath=True) if top < LARGEST_SUM else Float32(math.nan)
                )
                row_sum[r] = row_sum[r] * row_scale[r]
                row_max[r] = row_max[r] + shift / scale_log2
    for r in cutlass.range(cute.size(row_max), unroll_full=True):
        p = cute.math.exp2(acc_S_mn[r, None].load() * scale_log2 - row_max[r] * scale_log2, fastmath=True)
        before = None if cutlass.const_expr(is_first) else row_sum[r]
        row_sum[r] = utils.fadd_reduce(p, init_val=before, arch=arch)
        acc_S_mn[r, None].store(p)
    return row_scale


@cute.jit
def _settled_finalize(self, final_scale: Float32 = 1.0, sink_val: Float32 | None = None) -> cute.Tensor:
    """The last scales, 1 / sum; row_sum becomes the log of the row's sum, as the library has it."""
    row_max, row_sum, scale_log2 = self.row_max, self.row_sum, self.scale_log2
    row_sum.store(utils.warp_reduce(row_sum.load(), operator.add, width=4))
    row_scale = cute.make_fragment_like(row_max, Float32)
    for r in cutlass.range(cute.size(row_sum), unroll_full=True):
        total = row_sum[r]
        inverse = cute.arch.rcp_approx(total)
        # Also for NaN. A sum near fp32's end would have 0 for its inverse and hide that its row is lost.
        row_scale[r] = inverse * final_scale if total < LARGEST_SUM else Float32(math.nan)
        row_sum[r] = (row_max[r] * scale_log2 + cute.math.log2(total, fastmath=True)) * math.log(2.0)
    return row_scale


# Of each kind: a row's softmax, the output's rescale, the end.
_KINDS = {
    "own": (_own.online_softmax, _own.rescale_O, _own.finalize),
    "lazy": (_own.online_softmax, _rescale, _own.finalize),
    "settled": (_settled_softmax, _rescale, _settled_finalize),
}
# Compiled kernels of each kind, kept apart: the library's keys don't know which softmax was traced.
_caches = {"own": interface._flash_attn_fwd.compile_cache, "lazy": JITCache(), "settled": JITCache()}


_one_at_a_time = Lock()


@contextmanager
def using(kind: str) -> Iterator[None]:
    """The library's kernel has this kind of softmax meanwhile, in one thread at a time."""
    with _one_at_a_time:
        _own.online_softmax, _own.rescale_O, _own.finalize = _KINDS[kind]
        interface._flash_attn_fwd.compile_cache = _caches[kind]
        yield

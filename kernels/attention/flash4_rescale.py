# CuTe code is traced, not typed, and the packages are there on GPU machines only.
# mypy: ignore-errors
"""flash-attn-4's Hopper kernel with a rescale of the output that is skipped where it multiplies by one.

In online softmax the output so far is scaled by exp(old maximum - new maximum) at each block of keys. Over
a long sequence the maximum soon stops moving, so nearly all those products are by exactly 1 and leaving
them out changes no bit. The kernel for Blackwell does so already; this brings it to Hopper's. The warp
votes, so that no lane diverges.
"""

import cutlass
import cutlass.cute as cute
from flash_attn.cute import interface, softmax
from flash_attn.cute.cache_utils import JITCache
from quack import layout_utils

_eager = softmax.Softmax.rescale_O
# Compiled kernels of each kind, kept apart: the library's keys don't know which rescale was traced.
_caches = {False: interface._flash_attn_fwd.compile_cache, True: JITCache()}


@cute.jit
def _lazy(self, acc_O: cute.Tensor, row_scale: cute.Tensor) -> None:
    """Scale each row of acc_O, unless every row of the warp has scale 1."""
    least = row_scale[0]
    for r in cutlass.range_constexpr(1, cute.size(row_scale)):
        least = cute.arch.fmin(least, row_scale[r])
    if cute.arch.vote_ballot_sync(least < 1.0) != 0:
        acc_O_mn = layout_utils.reshape_acc_to_mn(acc_O)
        for r in cutlass.range(cute.size(row_scale), unroll_full=True):
            acc_O_mn[r, None].store(acc_O_mn[r, None].load() * row_scale[r])


def use(lazy: bool) -> None:
    """Call (and compile, where needed) the kernel with the lazy or the library's own rescale from now on."""
    softmax.Softmax.rescale_O = _lazy if lazy else _eager
    interface._flash_attn_fwd.compile_cache = _caches[lazy]

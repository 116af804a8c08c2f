"""How near a kernel must be: at most the plain torch result's own error to fp64, plus a tenth."""

import torch
from torch import Tensor

# Below this a comparison of two rounding errors says nothing.
FLOOR = {torch.float32: 2e-6, torch.bfloat16: 1e-3, torch.float16: 1.5e-4}


def relative_error(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want| in fp64; NaN if any value is NaN."""
    got, want = got.double(), want.double()
    return float((got - want).norm() / want.norm().clamp_min(1e-300))


def assert_as_good(got: Tensor, plain: Tensor, exact: Tensor) -> None:
    """`got` is finite, shaped as `exact` (fp64), and no worse than `plain` by more than a tenth."""
    assert got.shape == exact.shape, f"{tuple(got.shape)} for {tuple(exact.shape)}"
    ours, theirs = relative_error(got, exact), relative_error(plain, exact)
    limit = max(1.1 * theirs, FLOOR[got.dtype])
    assert ours <= limit, f"relative error {ours:.3g}, plain torch has {theirs:.3g} (limit {limit:.3g})"

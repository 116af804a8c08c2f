"""Wide-headed attention against fp64, under the interpreter or on the GPU."""

import pytest
import torch
from torch import Tensor

from kernels import wide_attention
from kernels.wide_attention import reference
from tests.kernels.check import assert_as_good


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("batch", "queries", "keys", "head"), [(1, 5, 7, 48), (2, 3, 130, 33), (1, 40, 1, 8)]
)
def test_attention(
    seed: int, device: torch.device, dtype: torch.dtype, batch: int, queries: int, keys: int, head: int
):
    """Also over odd numbers of keys, one key, and keys that lie apart (as parts of a packed product)."""
    from kernels.wide_attention import triton

    q = torch.randn(batch, 1, queries, head, device=device).to(dtype) * 2
    packed = torch.randn(batch, 1, keys, 2 * head, device=device).to(dtype)
    k, v = packed.chunk(2, dim=-1)
    exact = reference.attention(q.double(), k.double(), v.double())
    assert_as_good(triton.attention(q, k, v), plain(q, k, v), exact)


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The formula with probabilities rounded to the inputs' dtype, as torch's kernels do."""
    scores = q.float() @ k.float().transpose(-1, -2) * q.shape[-1] ** -0.5
    return (torch.softmax(scores, dim=-1).to(q.dtype).float() @ v.float()).to(q.dtype)


def test_blocks_of_queries_are_the_whole(seed: int, device: torch.device, monkeypatch: pytest.MonkeyPatch):
    from kernels.wide_attention import triton

    q, k, v = torch.randn(3, 1, 1, 130, 16, device=device)
    whole = triton.attention(q, k, v)
    monkeypatch.setattr(triton, "SCORES", 1)  # 128 queries at a time: 128 and 2
    assert_as_good(triton.attention(q, k, v), whole, whole.double())


def test_large_scores_and_many_equal_keys(seed: int, device: torch.device):
    """Scores beyond fp16's range, and probabilities below its smallest normal number."""
    from kernels.wide_attention import triton

    q = torch.full((1, 1, 2, 64), 60.0, device=device).half()
    k = torch.full((1, 1, 20_000, 64), 60.0, device=device).half()
    v = torch.randn(1, 1, 20_000, 64, device=device).half() + 3
    got = triton.attention(q, k, v)
    want = v.double().mean(dim=2, keepdim=True).expand(1, 1, 2, 64)
    assert ((got.double() - want).abs() < 2e-3).all()


@pytest.mark.filterwarnings("ignore:All-NaN:RuntimeWarning")  # the interpreter's own
def test_nan_stays_visible(device: torch.device):
    from kernels.wide_attention import triton

    q, k, v = torch.zeros(3, 1, 1, 4, 8, device=device)
    v[0, 0, 2, 3] = float("nan")
    got = triton.attention(q, k, v)
    assert got[..., 3].isnan().all()
    q[0, 0, 1] = float("nan")
    assert triton.attention(q, k, torch.ones_like(k))[0, 0, 1].isnan().all()


def test_too_many_keys_go_to_the_library(device: torch.device):
    from kernels.wide_attention import triton

    assert triton.fits(torch.zeros(1, 1, 3, 8))
    assert not triton.fits(torch.empty(1, 1, triton.LONGEST + 1, 8, device="meta"))
    q, k, v = torch.randn(3, 1, 1, 5, 8)
    assert torch.equal(wide_attention.attention(q, k, v), reference.attention(q, k, v))

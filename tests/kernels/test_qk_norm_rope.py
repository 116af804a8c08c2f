"""RMSNorm + RoPE + send layout against fp64, under the interpreter or on the GPU."""

import pytest
import torch
from torch import Tensor

from kernels.qk_norm_rope import reference
from tests.kernels.check import assert_as_good

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def tables(length: int, head: int, device: torch.device) -> tuple[Tensor, Tensor]:
    angle = torch.randn(length, head // 2, device=device, dtype=torch.float64) * 9
    return angle.cos().float(), angle.sin().float()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "length", "heads", "head", "ranks"),
    [(1, 5, 4, 8, 1), (2, 3, 6, 16, 3), (1, 1, 5, 12, 5), (1, 4, 3, 128, 1), (2, 2, 10, 24, 2)],
)
def test_qk_norm_rope(
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    batch: int,
    length: int,
    heads: int,
    head: int,
    ranks: int,
):
    from kernels.qk_norm_rope import triton

    dim = heads * head
    qkv = (torch.randn(batch, length, 3 * dim, device=device) * 4).to(dtype)
    weight_q, weight_k = torch.randn(2, dim, device=device)
    rope = tables(length, head, device)
    got = triton.qk_norm_rope(qkv, weight_q, weight_k, rope, heads, ranks, 1e-6)
    plain = reference.qk_norm_rope(qkv, weight_q, weight_k, rope, heads, ranks, 1e-6)
    exact = reference.qk_norm_rope(
        qkv.double(),
        weight_q.double(),
        weight_k.double(),
        (rope[0].double(), rope[1].double()),
        heads,
        ranks,
        1e-6,
    )
    for ours, theirs, right in zip(got, plain, exact, strict=True):
        assert ours.dtype == dtype
        assert_as_good(ours, theirs, right)
    assert torch.equal(got[2], plain[2])


def test_layout_sends_each_rank_its_heads(seed: int, device: torch.device):
    """Chunk r of the first dimension holds heads r * G and on, in order, of every token."""
    from kernels.qk_norm_rope import triton

    qkv = torch.arange(2 * 3 * 8 * 4, device=device, dtype=torch.float32).view(1, 2, 96)
    one = torch.ones(32, device=device)
    _, _, v = triton.qk_norm_rope(qkv, one, one, tables(2, 4, device), 8, 4, 1e-6)
    assert v.shape == (4, 1, 2, 2, 4)
    assert v.is_contiguous()
    for rank in range(4):
        assert torch.equal(v[rank, 0].flatten(1), qkv[0, :, 64 + 8 * rank : 64 + 8 * (rank + 1)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [32, 100, 1000])
def test_rms_norm(seed: int, device: torch.device, dtype: torch.dtype, dim: int):
    from kernels.qk_norm_rope import triton

    packed = torch.randn(2, 3, 2 * dim, device=device).to(dtype) * 3
    x, weight = packed[..., dim:], torch.randn(dim, device=device)
    got = triton.rms_norm(x, weight, 1e-6)
    exact = reference.rms_norm(x.double(), weight.double(), 1e-6)
    assert_as_good(got, reference.rms_norm(x, weight, 1e-6), exact)


def test_wrong_shapes_are_refused(device: torch.device):
    from kernels.qk_norm_rope import triton

    qkv, weight = torch.zeros(1, 4, 96, device=device), torch.ones(32, device=device)
    with pytest.raises(ValueError, match="over 3 ranks"):
        triton.qk_norm_rope(qkv, weight, weight, tables(4, 8, device), 4, 3, 1e-6)
    with pytest.raises(ValueError, match="one row a token"):
        triton.qk_norm_rope(qkv, weight, weight, tables(3, 8, device), 4, 2, 1e-6)
    with pytest.raises(ValueError, match="evenly spaced"):
        triton.rms_norm(torch.zeros(1, 32, 4, device=device).transpose(1, 2), weight, 1e-6)

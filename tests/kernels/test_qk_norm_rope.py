"""RMSNorm + RoPE + send layout against fp64, under the interpreter or on the GPU."""

import pytest
import torch
from torch import Tensor

from kernels.qk_norm_rope import reference
from kernels.qk_norm_rope.layout import SendLayout
from tests.kernels.check import assert_as_good

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def tables(length: int, head: int, device: torch.device) -> tuple[Tensor, Tensor]:
    angle = torch.randn(length, head // 2, device=device, dtype=torch.float64) * 9
    return angle.cos().float(), angle.sin().float()


SHAPES = pytest.mark.parametrize(
    ("batch", "length", "heads", "head", "ranks", "groups"),
    [
        (1, 5, 4, 8, 1, 1),
        (2, 3, 6, 16, 3, 1),
        (1, 1, 5, 12, 5, 1),
        (1, 4, 3, 128, 1, 1),
        (2, 2, 10, 24, 2, 2),
        (2, 3, 9, 8, 3, 2),
        (1, 2, 4, 8, 1, 2),
    ],
)


@pytest.mark.parametrize("dtype", DTYPES)
@SHAPES
def test_qk_norm_rope(
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    batch: int,
    length: int,
    heads: int,
    head: int,
    ranks: int,
    groups: int,
):
    """Packed, and q alone: in every layout, with values as exact as plain torch's."""
    from kernels.qk_norm_rope import triton

    dim = heads * head
    qkv = (torch.randn(batch, length, 3 * dim, device=device) * 4).to(dtype)
    weight_q, weight_k = torch.randn(2, dim, device=device)
    rope = tables(length, head, device)
    layout = SendLayout.of(heads, ranks, groups)
    got = triton.qk_norm_rope(qkv, weight_q, weight_k, rope, layout, 1e-6)
    plain = reference.qk_norm_rope(qkv, weight_q, weight_k, rope, layout, 1e-6)
    exact = reference.qk_norm_rope(
        qkv.double(),
        weight_q.double(),
        weight_k.double(),
        (rope[0].double(), rope[1].double()),
        layout,
        1e-6,
    )
    for ours, theirs, right in zip(got, plain, exact, strict=True):
        assert ours.dtype == dtype
        assert_as_good(ours, theirs, right)
    assert torch.equal(got[2], plain[2])
    assert torch.equal(triton.norm_rope(qkv[..., :dim], weight_q, rope, layout, 1e-6), got[0])
    assert torch.equal(triton.norm_rope(qkv[..., dim : 2 * dim], weight_k, rope, layout, 1e-6), got[1])


def test_layout_sends_each_rank_its_heads(seed: int, device: torch.device):
    """Of 12 heads in two groups over 4 ranks, rank r gets heads 2r, 2r + 1 and 8 + r of every token."""
    from kernels.qk_norm_rope import triton

    qkv = torch.arange(2 * 2 * 3 * 12 * 4, device=device, dtype=torch.float32).view(2, 2, 144)
    one, layout = torch.ones(48, device=device), SendLayout.of(12, 4, 2)
    assert layout.groups == (2, 1)
    _, _, v = triton.qk_norm_rope(qkv, one, one, tables(2, 4, device), layout, 1e-6)
    first, second = layout.parts(v, 2, 2)
    assert (first.shape, second.shape) == ((2, 4, 2, 2, 4), (2, 4, 2, 1, 4))
    heads = qkv[..., 96:].view(2, 2, 12, 4)
    for rank in range(4):
        assert torch.equal(first[:, rank], heads[:, :, 2 * rank : 2 * rank + 2])
        assert torch.equal(second[:, rank], heads[:, :, 8 + rank : 9 + rank])
    for part, view in zip((first, second), layout.slices(heads), strict=True):
        assert torch.equal(part, view)


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
        SendLayout.of(4, 3)
    with pytest.raises(ValueError, match="5 even heads"):
        triton.qk_norm_rope(qkv, weight, weight, tables(4, 8, device), SendLayout.of(5), 1e-6)
    with pytest.raises(ValueError, match="one row a token"):
        triton.qk_norm_rope(qkv, weight, weight, tables(3, 8, device), SendLayout.of(4, 2), 1e-6)
    with pytest.raises(ValueError, match="evenly spaced"):
        triton.rms_norm(torch.zeros(1, 32, 4, device=device).transpose(1, 2), weight, 1e-6)
    with pytest.raises(ValueError, match="evenly spaced"):  # a gap between two batch entries
        triton.rms_norm(torch.zeros(2, 4, 32, device=device)[:, :3], weight, 1e-6)
    cos, sin = tables(4, 8, device)
    rope = cos.double(), sin.double()
    with pytest.raises(ValueError, match=r"torch.float64: expected fp32"):
        triton.qk_norm_rope(qkv, weight, weight, rope, SendLayout.of(4), 1e-6)

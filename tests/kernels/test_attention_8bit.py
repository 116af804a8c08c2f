"""8-bit attention: the kernel against its emulation, the emulation against fp64."""

import pytest
import torch
from torch import Tensor

from kernels import attention_8bit
from kernels.attention import reference as exact
from kernels.attention_8bit import reference
from tests.kernels.check import relative_error


def inputs(device: torch.device, batch: int, queries: int, keys: int, heads: int, width: int) -> list[Tensor]:
    """q, k and v as a transformer has them: k with a mean that all tokens share, v of unlike channels."""
    q = torch.randn(batch, queries, heads, width, device=device)
    k = torch.randn(batch, keys, heads, width, device=device) + 8 * torch.randn(heads, width, device=device)
    v = torch.randn(batch, keys, heads, width, device=device) * torch.rand(heads, width, device=device) * 5
    return [x.bfloat16() for x in (q, k, v)]


@pytest.mark.parametrize(
    ("batch", "queries", "keys", "heads", "width"),
    [(1, 37, 53, 2, 16), (2, 16, 32, 1, 32), (1, 5, 1, 3, 16), (1, 33, 70, 1, 64), (1, 1, 40, 2, 16)],
)
def test_the_kernel_is_its_emulation(
    seed: int, device: torch.device, batch: int, queries: int, keys: int, heads: int, width: int
):
    from kernels.attention_8bit import triton

    q, k, v = inputs(device, batch, queries, keys, heads, width)
    got = triton.attention(q, k, v, triton.Tile(m=16, n=32, warps=4, stages=2))
    want = reference.attention(q, k, v, 16, 32)
    assert got.dtype == q.dtype
    assert not got.isnan().any()
    assert relative_error(got, want) < 6e-3


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("operand", ["q", "k", "v"])
@pytest.mark.parametrize("way", ["kernel", "emulation"])
def test_what_is_not_finite_stays_so(seed: int, device: torch.device, way: str, operand: str, bad: float):
    """Integers know no NaN. A broken weight must not become a finite, wrong video."""
    from kernels.attention_8bit import triton

    given = dict(zip("qkv", inputs(device, 1, 40, 40, 2, 16), strict=True))
    given[operand][0, 5, 1, 3] = bad
    want = exact.attention(*given.values())
    if way == "kernel":
        got = triton.attention(*given.values(), triton.Tile(m=16, n=32, warps=4, stages=2))
    else:
        got = reference.attention(*given.values(), 16, 32)
    lost = ~want.isfinite()
    assert lost.any()
    assert not got[lost].isfinite().any()
    assert got[:, :, 0].isfinite().all(), "the other head"


@pytest.mark.parametrize("length", [1, 16, 45])
def test_quantised_operands(seed: int, device: torch.device, length: int):
    from kernels.attention_8bit import triton

    _, k, v = inputs(device, 2, 1, length, 3, 16)
    mean = reference.mean_over_tokens(k)
    got, want = triton.quantize_blocks(k, mean, 16), reference.quantize_blocks(k, mean, 16)
    assert got.data.shape == (2, 3, length, 16)
    assert relative_error(got.scale, want.scale) < 1e-6
    assert (got.data.int() - want.data.int()).abs().max() <= 1
    assert (got.data != want.data).float().mean() < 0.01
    got_v, want_v = triton.quantize_channels(v), reference.quantize_channels(v)
    assert relative_error(got_v.scale, want_v.scale) < 1e-6
    assert relative_error(got_v.data.float(), want_v.data.float()) < 0.01
    assert got_v.data.shape[-1] % 16 == 0
    assert got_v.data.float()[..., length:].eq(0).all()


def test_heads_may_lie_apart(seed: int, device: torch.device):
    """q, k and v as slices of one packed tensor."""
    from kernels.attention_8bit import triton

    packed = torch.randn(1, 20, 3, 2, 16, device=device).bfloat16()
    q, k, v = packed.unbind(2)
    tile = triton.Tile(m=16, n=16, warps=4, stages=2)
    want = triton.attention(q.contiguous(), k.contiguous(), v.contiguous(), tile)
    assert torch.equal(triton.attention(q, k, v, tile), want)
    with pytest.raises(ValueError, match="expected a head dimension"):
        triton.attention(*torch.randn(3, 1, 5, 2, 24, device=device).unbind(0))


@pytest.mark.parametrize("width", [24, 64])
def test_the_emulation_is_near_attention(seed: int, width: int):
    q, k, v = inputs(torch.device("cpu"), 1, 150, 200, 2, width)
    want = exact.attention(q, k, v)
    smooth = relative_error(attention_8bit.attention(q, k, v), want)
    assert smooth < 0.05
    # What taking the mean from k is for: with it the common part uses up the 8 bits.
    plain = reference.quantize_blocks(k, None, 128)
    mean = reference.mean_over_tokens(k)
    kept = reference.quantize_blocks(k, mean, 128)
    of_block = torch.arange(200) // 128

    def error(found: reference.Blocks, offset: Tensor | float) -> float:
        back = found.data.float() * found.scale[:, :, of_block, None] + offset
        return float((back - k.transpose(1, 2).float()).norm())

    assert error(kept, mean[:, :, None]) < 0.5 * error(plain, 0.0)

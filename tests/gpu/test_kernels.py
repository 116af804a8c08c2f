"""Kernels at Wan's real shapes against fp64, through the dispatch that the engine calls."""

import pytest
import torch
import torch.nn.functional as F

from engine.rope import rope_table
from kernels import attention, gemm, norm_modulate, qk_norm_rope, vae_norm_silu, vae_upsample
from kernels.attention import reference as attention_reference
from kernels.gemm import reference as gemm_reference
from kernels.norm_modulate import Norm
from kernels.norm_modulate import reference as norm_reference
from kernels.qk_norm_rope import reference as qk_reference
from kernels.vae_norm_silu import reference as vae_reference
from kernels.vae_upsample import reference as upsample_reference
from tests.kernels.check import assert_as_good, relative_error

CUDA = torch.device("cuda")
HALF = [torch.bfloat16, torch.float16]


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=CUDA)


@pytest.mark.parametrize("sets", [1, 2])
@pytest.mark.parametrize(("length", "dim"), [(9450, 5120), (3410, 3072), (4095, 5120)])
def test_add_normalize(length: int, dim: int, sets: int):
    x, y, gate = randn(1, length, dim) * 3 + 2, randn(2, length, dim).bfloat16(), randn(1, sets, dim)
    norm = Norm(randn(1, sets, dim), randn(1, sets, dim), 1e-6, split=length // 3)
    new, got = norm_modulate.add_normalize(x, y, gate, norm, torch.bfloat16)
    plain_new, plain = norm_reference.add_normalize(x, y, gate, norm, torch.bfloat16)
    assert_as_good(
        new, plain_new, norm_reference.add_gated(x.double(), y.double(), gate.double(), norm.split)
    )
    wide = Norm(norm.shift.double(), norm.scale.double(), 1e-6, norm.split)
    assert_as_good(got, plain, norm_reference.normalize(new.double(), wide, torch.float64))


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
def test_affine_norm(dtype: torch.dtype):
    x, weight, bias = randn(2, 4095, 5120) * 4 - 1, randn(5120), randn(5120)
    got = norm_modulate.normalize(x, Norm.affine(weight, bias, 1e-6), dtype)
    plain = F.layer_norm(x, (5120,), weight, bias, 1e-6).to(dtype)
    exact = F.layer_norm(x.double(), (5120,), weight.double(), bias.double(), 1e-6)
    assert_as_good(got, plain, exact)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    ("length", "heads", "ranks", "groups"),
    [(9450, 40, 8, 2), (18900, 40, 4, 1), (3410, 24, 8, 2), (4095, 40, 1, 1), (501, 24, 3, 2)],
)
def test_qk_norm_rope(dtype: torch.dtype, length: int, heads: int, ranks: int, groups: int):
    dim, layout = heads * 128, qk_norm_rope.SendLayout.of(heads, ranks, groups)
    qkv = (randn(1, length, 3 * dim) * 2).to(dtype)
    weight_q, weight_k = randn(2, dim)
    cos, sin = (t[-length:] for t in rope_table((21, 45, 80), 128, CUDA))
    got = qk_norm_rope.qk_norm_rope(qkv, weight_q, weight_k, (cos, sin), layout, 1e-6)
    plain = qk_reference.qk_norm_rope(qkv, weight_q, weight_k, (cos, sin), layout, 1e-6)
    rope = (cos.double(), sin.double())
    exact = qk_reference.qk_norm_rope(qkv.double(), weight_q.double(), weight_k.double(), rope, layout, 1e-6)
    for ours, theirs, right in zip(got, plain, exact, strict=True):
        assert_as_good(ours, theirs, right)


def test_rms_norm():
    x, weight = randn(1, 9450, 5120).bfloat16(), randn(5120)
    exact = qk_reference.rms_norm(x.double(), weight.double(), 1e-6)
    plain = qk_reference.rms_norm(x, weight, 1e-6)
    assert_as_good(qk_norm_rope.rms_norm(x, weight, 1e-6), plain, exact)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("rows", [9450, 501])
@pytest.mark.parametrize(("n", "k"), [(15360, 5120), (5120, 13824), (3072, 14336)])
@pytest.mark.parametrize("epilogue", ["bias", "gelu", "gated"])
def test_products_of_our_kernel(epilogue: str, rows: int, n: int, k: int, dtype: torch.dtype):
    """Ours, whatever the table chooses."""
    from kernels.gemm import triton

    x, weight, bias = randn(1, rows, k).to(dtype), (randn(n, k) / k**0.5).to(dtype), randn(n).to(dtype)
    exact = gemm_reference.linear(x.double(), weight.double(), bias.double())
    if epilogue == "bias":
        got = triton.product(x, weight, bias, triton.BIAS, triton.Tile())
        assert_as_good(got, gemm_reference.linear(x, weight, bias), exact)
    elif epilogue == "gelu":
        got = triton.product(x, weight, bias, triton.GELU, triton.Tile(halves=False))
        assert_as_good(got, gemm_reference.linear_gelu(x, weight, bias), F.gelu(exact, approximate="tanh"))
    else:
        residual, gate = randn(1, rows, n), randn(1, 2, n)
        split = rows // 3
        got = triton.product(x, weight, bias, triton.GATED, triton.Tile(), residual, gate, split)
        plain = gemm_reference.linear_gated(x, weight, bias, residual, gate, split)
        exact = norm_reference.add_gated(residual.double(), exact, gate.double(), split)
        assert_as_good(got, plain, exact)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("rows", [9450, 37])
def test_products_as_dispatched(rows: int, dtype: torch.dtype):
    x, weight, bias = (
        randn(1, rows, 5120).to(dtype),
        (randn(13824, 5120) / 72).to(dtype),
        randn(13824).to(dtype),
    )
    exact = gemm_reference.linear(x.double(), weight.double(), bias.double())
    assert_as_good(gemm.linear(x, weight, bias), gemm_reference.linear(x, weight, bias), exact)
    plain = gemm_reference.linear_gelu(x, weight, bias)
    assert_as_good(gemm.linear_gelu(x, weight, bias), plain, F.gelu(exact, approximate="tanh"))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("channels", "height", "width"), [(96, 720, 1280), (192, 360, 640), (384, 90, 160)])
def test_vae_norm_silu(dtype: torch.dtype, channels: int, height: int, width: int):
    x = randn(1, channels, 2, height, width).to(dtype).contiguous(memory_format=torch.channels_last_3d)
    gamma = randn(channels)
    exact = vae_reference.norm_silu(x.double(), gamma.double())
    assert_as_good(vae_norm_silu.norm_silu(x, gamma), vae_reference.norm_silu(x, gamma), exact)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize(("channels", "height", "width"), [(96, 720, 1280), (192, 359, 637), (384, 90, 160)])
def test_vae_join(dtype: torch.dtype, frames: int, channels: int, height: int, width: int):
    """Sum, norm, SiLU and cached frames, as a residual block calls it."""
    last = torch.channels_last_3d
    x, shortcut = randn(2, 1, channels, frames, height, width).to(dtype).unbind(0)
    past = randn(1, channels, 2, height, width).to(dtype)
    bias, gamma = randn(2, channels).to(dtype).unbind(0)

    def run(join, wide: torch.dtype) -> tuple[torch.Tensor, ...]:
        """(the convolution's input, the next past, the sum)."""
        y, old = (t.to(wide).clone().contiguous(memory_format=last) for t in (x, past))
        out = torch.full((1, channels, frames + 2, height, width), float("nan"), device=CUDA, dtype=wide)
        out = out.contiguous(memory_format=last)
        more = {"past_BCTHW": old, "bias_C": bias.to(wide), "shortcut_BCTHW": shortcut.to(wide)}
        total = join(y, out, **more, gamma_C=gamma.to(wide), silu=True, keep=True)
        return out, old, total

    got = run(vae_norm_silu.join, dtype)
    plain, exact = run(vae_reference.join, dtype), run(vae_reference.join, torch.float64)
    for ours, theirs, right in zip(got, plain, exact, strict=True):
        assert_as_good(ours, theirs, right)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("c", "o", "height", "width"), [(192, 96, 360, 640), (384, 192, 45, 79)])
def test_vae_upsample(c: int, o: int, height: int, width: int, dtype: torch.dtype):
    """Phase convolutions with folded weights against doubling and convolving."""
    x, bias = randn(2, c, height, width).to(dtype), randn(o).to(dtype)
    weight = (randn(o, c, 3, 3) / (9 * c) ** 0.5).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    got = vae_upsample.interleave(F.conv2d(x, vae_upsample.fold(weight), padding=1), bias)
    plain = upsample_reference.upsample_conv(x, weight, bias)
    exact = upsample_reference.upsample_conv(x[:1].double(), weight.double(), bias.double())
    # Sums of weights are rounded once more, which costs 13 to 17 % of half precision's own error on a CPU.
    assert relative_error(got[:1], exact) <= 1.25 * relative_error(plain[:1], exact)
    assert got.isfinite().all()


@pytest.mark.parametrize(
    ("kind", "queries", "keys", "heads"), [("self", 9450, 9433, 5), ("cross", 9450, 512, 40)]
)
def test_attention(kind: str, queries: int, keys: int, heads: int):
    """The chosen backend at a real length, odd number of keys, a sample of queries against fp64."""
    q, (k, v) = randn(1, queries, heads, 128).bfloat16(), randn(2, 1, keys, heads, 128).bfloat16()
    sample = torch.randint(queries, (64,), device=CUDA)
    exact = attention_reference.attention(q[:, sample], k, v)
    plain = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    got = attention.attention(q, k, v, kind)
    assert got.isfinite().all()
    assert relative_error(got[:, sample], exact) <= 1.1 * relative_error(plain[:, sample], exact)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("pixels", "head"), [(90 * 160, 384), (3519, 1024)])
def test_wide_attention(pixels: int, head: int, dtype: torch.dtype):
    """Our form at the VAE's sizes, whatever the table chooses."""
    from kernels.wide_attention import triton

    q, k, v = randn(1, 1, pixels, 3 * head).to(dtype).chunk(3, dim=-1)
    sample = torch.randint(pixels, (64,), device=CUDA)
    exact = F.scaled_dot_product_attention(q[:, :, sample].double(), k.double(), v.double())
    got = triton.attention(q, k, v)
    assert got.isfinite().all()
    plain = F.scaled_dot_product_attention(q, k, v)[:, :, sample]
    assert relative_error(got[:, :, sample], exact) <= 1.1 * relative_error(plain, exact)

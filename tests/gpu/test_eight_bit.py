"""8-bit products, attention and blocks at Wan's real widths, against the emulation that a CPU runs."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.attention import WholeSequence
from engine.config import DiTConfig
from engine.dit import DiT
from engine.eight_bit import EightBitBlocks, Switch, hold
from engine.tiny import randomize
from kernels import attention, attention_8bit, fp8_gemm
from kernels.attention import reference as exact_attention
from kernels.attention_8bit import choice
from kernels.attention_8bit import reference as attention_reference
from kernels.fp8_gemm import Rows, reference
from kernels.norm_modulate import Norm
from tests.kernels.check import relative_error

CUDA = torch.device("cuda")


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, device=CUDA)


def near(got: Rows, want: Rows) -> None:
    """The same but for values at the edge between two e4m3 neighbours."""
    assert relative_error(got.scale, want.scale) < 1e-5
    assert relative_error(got.float(), want.float()) < 0.01


@pytest.mark.parametrize(("length", "dim"), [(9450, 5120), (4095, 3072)])
def test_norms_end_in_the_quantisation(length: int, dim: int):
    x, y, gate = randn(1, length, dim) * 3 + 2, randn(2, length, dim).bfloat16(), randn(1, 1, dim)
    norm = Norm(randn(1, 1, dim), randn(1, 1, dim), 1e-6)
    new, got = fp8_gemm.add_normalize(x, y, gate, norm)
    want_new, want = reference.add_normalize(x, y, gate, norm)
    assert relative_error(new, want_new) < 1e-6
    near(got, want)
    near(fp8_gemm.normalize(x, norm), reference.normalize(x, norm))


@pytest.mark.parametrize("width", [5120, 13824, 14336])
def test_rows_and_gelu(width: int):
    x = (randn(1, 3001, width) * 2).bfloat16()
    near(fp8_gemm.quantize_rows(x), reference.quantize_rows(x))
    near(fp8_gemm.gelu_quantize(x), reference.gelu_quantize(x))


@pytest.mark.parametrize(("rows", "n", "k"), [(9450, 15360, 5120), (4095, 5120, 13824), (77, 3072, 3072)])
@pytest.mark.parametrize("bias", [False, True])
def test_products(rows: int, n: int, k: int, bias: bool):
    x, weight = randn(1, rows, k).bfloat16(), (randn(n, k) / math.sqrt(k)).bfloat16()
    added = randn(n).bfloat16() if bias else None
    x8, w8 = fp8_gemm.quantize_rows(x), fp8_gemm.quantize_rows(weight)
    got = fp8_gemm.linear(x8, w8, added, torch.bfloat16)
    assert got.shape == (1, rows, n)
    # Fast accumulation keeps fewer bits of the partial sums than fp32.
    assert relative_error(got, reference.linear(x8, w8, added, torch.float32)) < 1e-2


@pytest.mark.parametrize("operand", ["q", "k", "v"])
def test_attention_keeps_what_is_not_finite(operand: str):
    """By the kernel that the table names: a lost row of the block before must not come out as numbers."""
    given = {name: randn(1, 1301, 3, 128).bfloat16() for name in "qkv"}
    given[operand][0, 700, 1, 3] = float("nan")
    lost = exact_attention.attention(*given.values()).isnan()
    got = attention_8bit.attention(*given.values())
    assert lost.any()
    assert got[lost].isnan().all()
    assert got[:, :, 0].isfinite().all()


@pytest.mark.parametrize(("queries", "keys", "heads", "width"), [(777, 1301, 3, 128), (4095, 4095, 5, 128)])
def test_attention(queries: int, keys: int, heads: int, width: int):
    q, v = randn(1, queries, heads, width).bfloat16(), randn(1, keys, heads, width).bfloat16()
    k = (randn(1, keys, heads, width) + 4 * randn(heads, width)).bfloat16()
    got = attention_8bit.attention(q, k, v)
    assert relative_error(got, attention_reference.attention(q, k, v)) < 2e-2
    assert relative_error(got, exact_attention.attention(q, k, v)) < 6e-2


def hopper_attention(tile: dict[str, Any], *qkv: Tensor) -> Tensor:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("a kernel for Hopper")
    from kernels.attention_8bit import hopper

    return hopper.attention(*qkv, hopper.Tile(**tile))


HOPPER_TILES = [{}, {"stages": 2}, {"ping": True}, {"magic": True}]
LENGTHS = [(777, 1301), (4095, 4095), (9450, 9450), (1, 1), (5, 128), (130, 129), (128, 255), (300, 256)]


@pytest.mark.parametrize("tile", HOPPER_TILES, ids=str)
@pytest.mark.parametrize(("queries", "keys"), LENGTHS)
def test_hoppers_attention(queries: int, keys: int, tile: dict[str, Any]):
    """Right at every remainder of blocks, and the same bits each time: what a race would change."""
    q, v = randn(2, queries, 3, 128).bfloat16(), randn(2, keys, 3, 128).bfloat16()
    k = (randn(2, keys, 3, 128) + 4 * randn(3, 128)).bfloat16()
    got = hopper_attention(tile, q, k, v)
    assert relative_error(got, attention_reference.attention(q, k, v, last_first=True)) < 2e-2
    assert relative_error(got, exact_attention.attention(q, k, v)) < 6e-2
    for _ in range(20):
        assert torch.equal(hopper_attention(tile, q, k, v), got)


def test_the_chosen_attention_is_right():
    for tokens in (75600, 32760):
        name = choice.choice(torch.bfloat16, 128, tokens, CUDA)
        assert choice.probe(name, torch.bfloat16, 128, CUDA) < choice.TOLERANCE


def test_cudnns_8_bit_attention():
    """Right, if perhaps coarser than what may be chosen."""
    pytest.importorskip("cudnn", reason="needs nvidia-cudnn-frontend")
    assert choice.probe(choice.CUDNN, torch.bfloat16, 128, CUDA) < 0.1


def test_a_whole_expert_of_two_blocks():
    config = DiTConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=2, text_dim=64)
    expert = DiT(config)
    randomize(expert, torch.Generator().manual_seed(1))
    expert = expert.to(CUDA).requires_grad_(False).eval()
    expert.blocks.bfloat16()
    plain = attention.choose("self", torch.bfloat16, 128, CUDA)
    latents, text = randn(1, 16, 3, 30, 40), randn(2, 512, 64)
    expert.text_embedding.bfloat16()
    switch = Switch(plain)
    sequence, time = WholeSequence(switch), torch.tensor([[500.0]], device=CUDA)
    kv = expert.encode_text(text.bfloat16())
    want = expert(latents, time, kv, sequence)
    for block in expert.blocks:
        block.eight = EightBitBlocks(switch, keep_weights=True)  # type: ignore[assignment]
    got = expert(latents, time, kv, sequence)
    error = relative_error(got, want)
    print(f"relative error of two blocks in 8 bits {error:.3g}")
    assert 1e-4 < error < 0.1
    alone = EightBitBlocks(switch, keep_weights=False)
    for block in expert.blocks:
        alone.held[block] = hold(block)  # type: ignore[index, arg-type]
        block.eight = alone  # type: ignore[assignment]
    assert torch.equal(expert(latents, time, kv, sequence), got)

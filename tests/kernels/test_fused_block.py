"""The engine's fused blocks give what its plain blocks give (on a CPU, through the references)."""

import pytest
import torch
from torch import Tensor, nn

from engine import fused
from engine.attention import Overlap, WholeSequence
from engine.config import DiTConfig
from engine.dit import DiT
from engine.rope import rope_table
from tests.kernels.check import relative_error

CONFIG = DiTConfig(dim=96, ffn_dim=160, num_heads=4, num_layers=2, text_dim=32, text_len=7)
GRID = (3, 2, 4)


def random_model(dtype: torch.dtype) -> DiT:
    """Every tensor random, so that none can be left out unnoticed."""
    model = DiT(CONFIG)
    for name, parameter in model.named_parameters():
        centre = 1.0 if ".norm" in name and name.endswith("weight") else 0.0
        scale = 0.3 if parameter.ndim < 2 or "modulation" in name else parameter.shape[-1] ** -0.5
        nn.init.normal_(parameter, centre, scale)
    for block in model.blocks:
        for layer in block.modules():
            if isinstance(layer, nn.Linear):
                layer.to(dtype)
    return model.requires_grad_(False)


def run_both(
    model: DiT,
    x: Tensor,
    text_batch: int,
    sets: int,
    split: int,
    times: int = 1,
    overlap: Overlap | None = None,
) -> tuple[Tensor, Tensor]:
    """(fused, plain) patches of the head after all blocks, whose streams are the same too."""
    time, e = torch.randn(times, sets, CONFIG.dim), torch.randn(times, sets, 6, CONFIG.dim) * 0.5
    rope = rope_table(GRID, CONFIG.head_dim, torch.device("cpu"))
    dtype = model.blocks[0].ffn[0].weight.dtype
    text = [
        tuple(torch.randn(2, text_batch, CONFIG.text_len, CONFIG.num_heads, CONFIG.head_dim).to(dtype))
        for _ in model.blocks
    ]
    sequence, length = WholeSequence(), x.shape[1]
    sequence.overlap = overlap or sequence.overlap
    stream = fused.run_blocks(list(model.blocks), x, e, split, rope, text, sequence, length)
    joined = stream.joined(split)
    got = fused.head(model.head, stream, time, split)
    for block, text_kv in zip(model.blocks, text, strict=True):
        x = block(x, e, split, rope, text_kv, sequence, length)
    assert relative_error(joined, x) < (1e-5 if dtype == torch.float32 else 2e-2)
    return got, model.head(x, time, split)


@pytest.mark.parametrize(("sets", "split"), [(1, 0), (2, 8), (2, 0)])
@pytest.mark.parametrize("text_batch", [1, 2])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 3e-6), (torch.bfloat16, 2e-2)])
def test_fused_is_plain(
    seed: int, dtype: torch.dtype, limit: float, text_batch: int, sets: int, split: int
) -> None:
    """Also with the clean first frame's own modulation, and with one stream for two guidance passes."""
    model = random_model(dtype)
    got, plain = run_both(model, torch.randn(1, 24, CONFIG.dim) * 2, text_batch, sets, split)
    assert got.shape == plain.shape == (text_batch, 24, 64)
    assert relative_error(got, plain) < limit


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("split_qkv", [False, True])
def test_passes_in_turns_are_plain(seed: int, split_qkv: bool, times: int) -> None:
    """As on ranks that exchange data; each pass may have a timestep of its own."""
    x = torch.randn(times, 24, CONFIG.dim) * 2
    overlap = Overlap(split_qkv=split_qkv, interleave=True)
    got, plain = run_both(random_model(torch.float32), x, 2, 2, 8, times, overlap)
    assert relative_error(got, plain) < 3e-6


def test_packed_weights_are_the_layers_own(seed: int) -> None:
    """One storage under two names: updates in place reach both, replaced weights are packed again."""
    attention = random_model(torch.float32).blocks[0].self_attn
    before = attention.k.weight.clone()
    weight, bias = fused.packed_qkv(attention)
    assert torch.equal(attention.k.weight, before)
    assert torch.equal(weight, torch.cat([layer.weight for layer in (attention.q, attention.k, attention.v)]))
    attention.v.weight.mul_(2)
    attention.q.bias.add_(1)
    again = fused.packed_qkv(attention)
    assert again[0] is weight
    assert torch.equal(weight[-1], attention.v.weight[-1])
    assert torch.equal(bias[:96], attention.q.bias)
    attention.k.weight.data = torch.randn(96, 96)
    assert torch.equal(fused.packed_qkv(attention)[0][96:192], attention.k.weight)


def test_plain_where_it_must_be(seed: int) -> None:
    """On a CPU, and wherever gradients are wanted, the plain blocks run."""
    weight = torch.zeros(2, 2, dtype=torch.bfloat16)
    assert not fused.applies(weight)

"""Hopper's own 8-bit attention as far as a CPU can tell: the order of v's tokens, and of its steps."""

import pytest
import torch
from torch import Tensor

from kernels.attention import reference as exact
from kernels.attention_8bit import hopper, reference
from kernels.fp8_gemm.rows import decode
from tests.kernels.check import relative_error

BLOCK = 128


def test_each_lane_keeps_its_scores():
    """By the PTX ISA's figures: where wgmma leaves a score is where it wants the P that comes of it."""
    order = reference.slots(32).tolist()
    assert sorted(order) == list(range(32))
    for lane in range(4):
        left = [8 * n + 2 * lane + e for n in range(4) for e in (0, 1)]  # accumulator, m64nNk32.s32
        taken = [16 * half + 4 * lane + byte for half in (0, 1) for byte in range(4)]  # operand A, e4m3
        assert [order[place] for place in taken] == left
    with pytest.raises(ValueError, match="multiple of 16"):
        reference.slots(24)


@pytest.mark.parametrize("length", [1, 16, 45, 130])
def test_the_kernel_that_quantises_v_permutes_it(seed: int, device: torch.device, length: int):
    from kernels.attention_8bit import triton

    v = torch.randn(2, length, 3, 16, device=device).bfloat16()
    plain, got = triton.quantize_channels(v), triton.quantize_channels(v, slots=True)
    order = reference.slots(plain.data.shape[-1]).to(device)
    assert torch.equal(got.data.float(), plain.data.float()[..., order])
    assert torch.equal(got.scale, plain.scale)


def in_the_kernels_order(q_BLHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor) -> Tensor:
    """Its steps in plain torch: last block first, a product joins one step late, P's columns by slots."""
    tokens = k_BTHK.shape[1]
    blocks = -(-tokens // BLOCK)
    q = reference.quantize_blocks(q_BLHK, None, BLOCK)
    k = reference.quantize_blocks(k_BTHK, reference.mean_over_tokens(k_BTHK), BLOCK)
    v = reference.quantize_channels(v_BTHK)
    padded = v.data.shape[-1]
    # What the TMA gives past the end: zeros for v, anything for k.
    v_BHKT = torch.nn.functional.pad(decode(v.data)[..., reference.slots(padded)], (0, -padded % BLOCK))
    k_BHTK = torch.nn.functional.pad(k.data.float(), (0, 0, 0, -tokens % BLOCK), value=77.0)
    of_query = q.scale.repeat_interleave(BLOCK, 2)[:, :, : q_BLHK.shape[1], None]
    of_query = of_query * (reference.LOG2E * q_BLHK.shape[-1] ** -0.5)
    order = reference.slots(BLOCK)
    q_BHLK = q.data.float()
    highest = q_BHLK.new_full((*q_BHLK.shape[:3], 1), -torch.inf)
    total, out, fade, words = torch.zeros_like(highest), torch.zeros_like(q_BHLK), 0.0, None
    for step in range(blocks + 1):
        # Stage `step` of the ring.
        key, value = blocks - 1 if step == 0 else step - 1, blocks - 1 if step == 1 else max(step - 2, 0)
        product = 0.0
        if words is not None:
            product = words @ v_BHKT[..., value * BLOCK : value * BLOCK + BLOCK].transpose(-1, -2)
        out = out * fade + product
        if step == blocks:
            break
        scores = q_BHLK @ k_BHTK[:, :, key * BLOCK : key * BLOCK + BLOCK].transpose(-1, -2)
        if step == 0:
            scores[..., key * BLOCK + torch.arange(BLOCK) >= tokens] = -(2.0**30)
        scores = scores * (of_query * k.scale[:, :, key, None, None])
        now = torch.maximum(highest, scores.amax(-1, keepdim=True))
        p, fade = torch.exp2(scores - now + hopper.BIAS.value), torch.exp2(highest - now)
        total, highest = total * fade + p.sum(-1, keepdim=True), now
        words = decode(p.clamp_max(reference.LARGEST).to(reference.E4M3))[..., order]
    return (out / total * v.scale[:, :, None]).transpose(1, 2).to(q_BLHK.dtype)


@pytest.mark.parametrize(("queries", "keys"), [(5, 1), (130, 128), (7, 129), (70, 500)])
def test_its_order_of_steps_gives_attention(seed: int, queries: int, keys: int):
    q, v = torch.randn(1, queries, 2, 32).bfloat16(), torch.randn(1, keys, 2, 32).bfloat16()
    k = (torch.randn(1, keys, 2, 32) + 4 * torch.randn(2, 32)).bfloat16()
    got = in_the_kernels_order(q, k, v)
    assert relative_error(got, exact.attention(q, k, v)) < 6e-2
    assert relative_error(got, reference.attention(q, k, v, last_first=True)) < 6e-3


def test_it_refuses_what_it_is_not_for():
    with pytest.raises(ValueError, match="on a Hopper GPU"):
        hopper.attention(*torch.randn(3, 1, 5, 2, 128).unbind(0))

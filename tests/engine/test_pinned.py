"""Pinned memory in slabs: nothing overlaps, copies are equal, and the plan knows what is taken."""

import random

import pytest
import torch
from torch import Tensor

from engine import pinned
from engine.pinned import ALIGNMENT, pinned_bytes, pinned_copies, places

MIB = 1 << 20


def test_places_follow_one_another_and_overlap_nowhere(rng: random.Random) -> None:
    sizes = [rng.randrange(1, 3000) for _ in range(200)] + [9000]  # the last is wider than a slab
    where, slabs = places(sizes, slab=8192)
    taken: dict[int, int] = {}
    for size, (slab, start) in zip(sizes, where, strict=True):
        assert start == taken.get(slab, 0)
        assert start % ALIGNMENT == 0
        taken[slab] = start + -(-size // ALIGNMENT) * ALIGNMENT
        assert start + size <= slabs[slab]
    assert all(size & (size - 1) == 0 for size in slabs)
    assert sum(slabs) < 1.5 * sum(sizes)


def test_an_a14b_experts_blocks_take_a_tenth_more_than_they_are() -> None:
    """Its matrices one by one would be rounded up by 62 %."""
    wide, square, up = 3 * 5120 * 5120 * 2, 5120 * 5120 * 2, 5120 * 13824 * 2
    block = [wide, square, *4 * [square], up, up, *12 * [5120 * 4]]
    taken, needed = pinned_bytes([block] * 40), 40 * sum(block)
    alone = sum(1 << (size - 1).bit_length() for size in block) * 40
    print(f"{needed / 2**30:.1f} GiB in {taken / 2**30:.1f}, one by one {alone / 2**30:.1f}")
    assert needed <= taken < 1.1 * needed
    assert alone > 1.6 * needed


def test_copies_are_equal_and_take_what_was_foreseen(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = [
        [torch.randn(7, 33, generator=generator), torch.randn(5, generator=generator).bfloat16()],
        [torch.randn(600, 7, generator=generator).half(), torch.randn((), generator=generator)],
    ]
    made: list[int] = []
    original = torch.empty

    def empty(size: int, **options: object) -> Tensor:
        made.append(size)
        return original(size, dtype=torch.uint8)

    monkeypatch.setattr(pinned.torch, "empty", empty)
    copies = pinned_copies(blocks, pin=False)
    assert sum(made) == pinned_bytes([[tensor.nbytes for tensor in block] for block in blocks])
    for block, copied in zip(blocks, copies, strict=True):
        for tensor, copy in zip(block, copied, strict=True):
            assert copy.dtype == tensor.dtype
            assert torch.equal(copy, tensor)
            assert copy.data_ptr() != tensor.data_ptr()

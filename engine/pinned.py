"""Pinned host memory in slabs of a power of two.

Torch's allocator rounds every pinned allocation up to a power of two, so that tensors of 135 and 150 MiB take
256 each: an A14B expert's 26 GiB of blocks would take 42. In slabs of 1 GiB they take 27.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

SLAB = 1 << 30  # bytes
ALIGNMENT = 512  # bytes


def places(sizes: Iterable[int], slab: int = SLAB) -> tuple[list[tuple[int, int]], list[int]]:
    """(slab, offset) of tensors of so many bytes, one after another, and the bytes of each slab."""
    found: list[tuple[int, int]] = []
    ends: list[int] = []
    for size in sizes:
        whole = -(-size // ALIGNMENT) * ALIGNMENT
        if not ends or ends[-1] + whole > slab:
            ends.append(0)
        found.append((len(ends) - 1, ends[-1]))
        ends[-1] += whole
    return found, [1 << (end - 1).bit_length() for end in ends]


def pinned_bytes(blocks: Sequence[Sequence[int]]) -> int:
    """What `pinned_copies` takes for blocks of tensors of so many bytes each."""
    return sum(places(size for sizes in blocks for size in sorted(sizes, reverse=True))[1])


def pinned_copies(blocks: Sequence[Sequence[Tensor]], *, pin: bool) -> list[list[Tensor]]:
    """Copies of all blocks' tensors in host memory, pinned where there is a GPU to copy to."""
    order = [
        (block, index)
        for block, tensors in enumerate(blocks)
        for index in sorted(range(len(tensors)), key=lambda i, t=tensors: -t[i].nbytes)  # type: ignore[misc]
    ]
    where, ends = places(blocks[block][index].nbytes for block, index in order)
    slabs = [torch.empty(end, dtype=torch.uint8, pin_memory=pin) for end in ends]
    copies = [list(tensors) for tensors in blocks]
    for (block, index), (slab, start) in zip(order, where, strict=True):
        tensor = blocks[block][index]
        memory = slabs[slab][start : start + tensor.nbytes]
        copies[block][index] = memory.view(tensor.dtype).view(tensor.shape).copy_(tensor)
    return copies

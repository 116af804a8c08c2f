"""The text encoder over ranks: each prompt is encoded once, not once a rank.

Shapes: T text tokens, E embedding width.
"""

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor


def broadcast_texts(
    encode: Callable[[int], Tensor], count: int, shape: tuple[int, int], like: Tensor
) -> list[Tensor]:
    """`encode(i)` of `shape` for each i below `count` on every rank, done side by side on ranks far apart."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    owners = [ranks * i // count for i in range(count)]
    texts = [
        encode(i).contiguous() if owner == rank else like.new_empty(shape) for i, owner in enumerate(owners)
    ]
    for text, owner in zip(texts, owners, strict=True):
        dist.broadcast(text, src=owner)
    return texts

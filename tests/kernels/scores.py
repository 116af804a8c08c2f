"""Queries, keys and values in bf16, [1, L, H, K] each, whose scores are hard on a softmax."""

import torch
from torch import Tensor

from tests.kernels.check import relative_error


def growing(tokens: int, heads: int, head: int, by: float) -> tuple[Tensor, Tensor, Tensor]:
    """Scores grow from 0 to about `by`, from the last key to the first: the order blocks are taken in."""
    q, k, v = torch.randn(3, 1, tokens, heads, head).unbind(0)
    ramp = torch.linspace(1, 0, tokens)[None, :, None, None]
    direction = torch.randn(head)
    direction /= direction.norm()
    q = 0.3 * q + head**0.5 * direction
    k = 0.3 * k + ramp * direction * by
    return q.bfloat16(), k.bfloat16(), v.bfloat16()


JUMPS = [  # heights of the key that is met first and of the one that is met after it
    ((60.0, None), False),
    ((60.0, 55.0), False),
    ((75.0, 130.0), False),
    ((80.0, 80.0), False),
    ((90.0, 60.0), True),  # the first is finite, and its block the last that could be
    ((95.0, 95.0), True),
    ((106.0, 106.0), True),
    ((109.0, 80.0), True),
    ((120.0, 120.0), True),
    ((20.0, 110.0), True),
    ((200.0, None), True),
    ((3e4, None), True),
]


def jumping(
    tokens: int, heads: int, head: int, first: float, then: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries 0, 3, 6 ... see two keys so far above the others, queries 2, 5, 8 ... as far below.

    Blocks are taken from the last key to the first. `first` is in the middle, `then` is key 5 (None: none).
    """
    q, k, v = (torch.randn(3, 1, tokens, heads, head) * 0.5).bfloat16().unbind(0)
    for place, by in ((tokens // 2, first), (5, then)):
        if by is not None:
            k[:, place] = 0
            k[:, place, :, 0] = by
    q[:, ::3, :, 0], q[:, 1::3, :, 0], q[:, 2::3, :, 0] = head**0.5, 0, -(head**0.5)
    return q, k, v


def never_wrong(got: Tensor, want: Tensor, lost: bool) -> None:
    """What `jumping` must give: rows that are NaN where they are lost, and no others that are off."""
    high = slice(None, None, 3)
    for part in (slice(1, None, 3), slice(2, None, 3), *(() if lost else (high,))):
        assert relative_error(got[:, part], want[:, part]) < 5e-3
    if lost:
        assert got[:, high].isnan().all()

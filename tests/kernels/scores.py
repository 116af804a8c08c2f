"""Queries, keys and values in bf16, [1, L, H, K] each, whose scores are hard on a softmax."""

import torch
from torch import Tensor


def growing(tokens: int, heads: int, head: int, by: float) -> tuple[Tensor, Tensor, Tensor]:
    """Scores grow from 0 to about `by`, from the last key to the first: the order blocks are taken in."""
    q, k, v = torch.randn(3, 1, tokens, heads, head).unbind(0)
    ramp = torch.linspace(1, 0, tokens)[None, :, None, None]
    direction = torch.randn(head)
    direction /= direction.norm()
    q = 0.3 * q + head**0.5 * direction
    k = 0.3 * k + ramp * direction * by
    return q.bfloat16(), k.bfloat16(), v.bfloat16()


def jumping(tokens: int, heads: int, head: int, by: float) -> tuple[Tensor, Tensor, Tensor]:
    """Queries 0, 3, 6 ... see key 5 `by` above the others, queries 2, 5, 8 ... as far below."""
    q, k, v = (torch.randn(3, 1, tokens, heads, head) * 0.5).bfloat16().unbind(0)
    k[:, 5] = 0
    k[:, 5, :, 0] = by
    q[:, ::3, :, 0], q[:, 1::3, :, 0], q[:, 2::3, :, 0] = head**0.5, 0, -(head**0.5)
    return q, k, v

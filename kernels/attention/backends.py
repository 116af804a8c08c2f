"""Attention by other libraries' kernels behind one signature; every key counts (callers cut padding off).

Shapes: B batch, L query tokens, T key tokens, H heads, K head dimension.
"""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.attention.settled import settled

Backend = Callable[[Tensor, Tensor, Tensor, dict[str, Any]], Tensor]


def _sdpa(q_BLHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor, only: list[SDPBackend]) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BLHK, k_BTHK, v_BTHK))
    with sdpa_kernel(only):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def cudnn(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
    """The cuDNN kernel, through torch."""
    return _sdpa(q, k, v, [SDPBackend.CUDNN_ATTENTION])


def flash2(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
    """FlashAttention-2, as built into torch."""
    return _sdpa(q, k, v, [SDPBackend.FLASH_ATTENTION])


def sdpa(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
    """Whatever torch chooses; the only one on a CPU."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def flash4(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
    """flash-attn-4 (Hopper, Blackwell), with the tile that the tuning table names, else its own.

    The option `softmax` names a cheaper one: "lazy" or "settled" (`kernels.attention.flash4_softmax`).
    """
    from flash_attn.cute.interface import _flash_attn_fwd

    extra = dict(options)
    kind = extra.pop("softmax", "own")
    if kind == "settled" and not (q.dtype is torch.bfloat16 and settled.ask()):
        kind = "lazy"
    if "tile_mn" in extra:
        extra["tile_mn"] = tuple(extra["tile_mn"])
    softmax: AbstractContextManager[None] = nullcontext()
    if kind != "own" or "kernels.attention.flash4_softmax" in sys.modules:
        from kernels.attention import flash4_softmax

        softmax = flash4_softmax.using(kind)
    with softmax:
        out: Tensor = _flash_attn_fwd(q, k, v, **extra)[0]
    return out


BACKENDS: dict[str, Backend] = {"flash4": flash4, "cudnn": cudnn, "flash2": flash2, "sdpa": sdpa}

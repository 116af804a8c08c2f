"""Attention: the fastest backend that gives the right answer on this device, chosen by a probe.

Order: flash-attn-4 (with the tile that the device's tuning table names), cuDNN, FlashAttention-2, torch's
own choice. A backend that doesn't import, fails, or disagrees with the fp64 formula on a small odd-sized
input is passed over, with the reason in the log. Shapes as in `kernels.attention.backends`.
"""

import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from kernels import tables
from kernels.attention import reference
from kernels.attention.backends import BACKENDS
from kernels.attention.waves import Tile, pick

__all__ = ["Choice", "attention", "choice", "choose", "probe"]

log = logging.getLogger(__name__)

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Choice = tuple[str, dict[str, Any]]  # backend and its options

ORDER = ("flash4", "cudnn", "flash2", "sdpa")
# Relative error that right bf16 or fp16 attention stays under: inputs, P and output are rounded.
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-3}


def probe(choice: Choice, dtype: torch.dtype, head: int, device: torch.device, tokens: int = 777) -> float:
    """Relative error of a backend to the fp64 formula on random normal input; raises what it raises.

    The output is poisoned by reading garbage first: NaN anywhere gives NaN, which passes no comparison.
    """
    generator = torch.Generator(device).manual_seed(tokens)
    shape = (3, 1, tokens, 3, head)
    q, k, v = torch.randn(shape, generator=generator, device=device).to(dtype).unbind(0)
    k, v = k[:, : tokens - 60], v[:, : tokens - 60]
    name, options = choice
    got = BACKENDS[name](q, k, v, options).double()
    want = reference.attention(q, k, v)
    return float((got - want).norm() / want.norm())


def _works(choice: Choice, dtype: torch.dtype, head: int, device: torch.device) -> bool:
    try:
        error = probe(choice, dtype, head, device)
    except Exception as failure:  # any library may fail in any way: the next backend is the remedy
        log.info("attention backend %s passed over: %s: %s", choice, type(failure).__name__, failure)
        return False
    if not error < TOLERANCE[dtype]:
        log.warning("attention backend %s passed over: relative error %.3g", choice, error)
        return False
    return True


def candidates(kind: str, head: int, device: torch.device) -> list[Choice]:
    """What to try for `kind` ("self" or "cross"), best first; the table's own entry leads."""
    # Over a few hundred keys cuDNN measured 1.6 times as fast as the others.
    order = ("cudnn", "flash4", "flash2", "sdpa") if kind == "cross" else ORDER
    plain: list[Choice] = [(name, {}) for name in order]
    tuned = tables.setting("attention", f"{kind} {head}", device, {})
    return [(tuned["backend"], tuned.get("options", {})), *plain] if tuned else plain


@lru_cache(maxsize=32)
def _tiles(kind: str, dtype: torch.dtype, head: int, device: torch.device) -> tuple[Tile, ...]:
    tuned = tables.setting("attention", f"{kind} {head}", device, {})
    on = {"heads": tuned.get("heads", 1), "queries": tuned.get("queries", 1)}
    tiles = (Tile(one["options"], one["ms"], **on) for one in tuned.get("tiles", ()))
    return tuple(tile for tile in tiles if _works((tuned["backend"], tile.options), dtype, head, device))


def tiles_of(
    chosen: Choice, kind: str, dtype: torch.dtype, head: int, device: torch.device
) -> tuple[Tile, ...]:
    """The table's tiles of the backend that was chosen, as far as they pass the probe; () for another's."""
    first = candidates(kind, head, device)[0]
    return _tiles(kind, dtype, head, device) if device.type == "cuda" and chosen == first else ()


@lru_cache(maxsize=32)
def choice(kind: str, dtype: torch.dtype, head: int, device: torch.device) -> Choice:
    """The first backend and options that pass the probe for `kind` of attention. Cached."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return "sdpa", {}
    for candidate in candidates(kind, head, device):
        if _works(candidate, dtype, head, device):
            log.info("attention backend for %s, head %d, %s: %s", kind, head, dtype, candidate)
            return candidate
    raise RuntimeError(f"no attention backend gives right results for head {head} in {dtype} on {device}")


def choose(kind: str, dtype: torch.dtype, head: int, device: torch.device) -> Attend:
    """The chosen backend for `kind` ("self" or "cross") of attention, ready to call.

    Where the table knows several tiles of it, each call takes the one that suits its shape.
    """
    name, options = choice(kind, dtype, head, device)
    backend, tiles = BACKENDS[name], tiles_of((name, options), kind, dtype, head, device)
    if len(tiles) < 2:
        return lambda q, k, v: backend(q, k, v, options)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return lambda q, k, v: backend(q, k, v, pick(tiles, q.shape[0] * q.shape[2], q.shape[1], processors))


def attention(q_BLHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor, kind: str = "self") -> Tensor:
    """softmax(q k^T / sqrt(K)) v, [B, L, H, K]; `kind` ("self", "cross") may have backends of its own."""
    return choose(kind, q_BLHK.dtype, q_BLHK.shape[-1], q_BLHK.device)(q_BLHK, k_BTHK, v_BTHK)

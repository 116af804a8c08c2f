"""Which 8-bit attention computes: ours, or one the table names as faster here (Hopper's own, a library's).

A tuning table's entry of ("attention_8bit_backend", `table_key`) names the winner of a GPU and shape; without
an entry it is ours (on Hopper the one in `hopper`). Whatever is named must first agree with the fp64 formula
on a small odd-sized input.

Shapes: B batch, L query tokens, T key tokens, H heads, K head dimension.
"""

import logging
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from kernels import tables
from kernels.attention import reference as exact
from kernels.attention_8bit import reference

log = logging.getLogger(__name__)
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
TABLE, OURS, HOPPER, CUDNN = "attention_8bit_backend", "ours", "hopper", "cudnn"
# Relative error to fp64 on random normal operands, k with a mean. It tells a kernel that is wrong; whether
# one is good enough is for the floors of the quality table to say.
TOLERANCE = 8e-2


def ours(q_BLHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor) -> Tensor:
    """Our Triton kernel; its emulation for what the kernel doesn't take."""
    from kernels.attention_8bit import triton

    if triton.fits(q_BLHK, k_BTHK, v_BTHK):
        return triton.attention(q_BLHK, k_BTHK, v_BTHK)
    return reference.attention(q_BLHK, k_BTHK, v_BTHK)


def hopper(q_BLHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor) -> Tensor:
    """Ours in Gluon, for Hopper and heads of 128; raises for anything else, or without Gluon."""
    from kernels.attention_8bit import hopper as kernel

    return kernel.attention(q_BLHK, k_BTHK, v_BTHK)


def cudnn(q_BLHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor) -> Tensor:
    """cuDNN's, through nvidia-cudnn-frontend."""
    from kernels.attention_8bit import cudnn_fp8

    return cudnn_fp8.attention(q_BLHK, k_BTHK, v_BTHK)


BACKENDS: dict[str, Attend] = {OURS: ours, HOPPER: hopper, CUDNN: cudnn}


def table_key(head: int, tokens: int) -> str:
    """The table's key: head dimension, and keys rounded up to a power of two."""
    return f"{head} {1 << max(tokens - 1, 1).bit_length()}"


def probe(name: str, dtype: torch.dtype, head: int, device: torch.device, tokens: int = 777) -> float:
    """Relative error of a backend to the fp64 formula; raises what it raises. NaN anywhere gives NaN."""
    generator = torch.Generator(device).manual_seed(tokens)
    q, k, v, mean = torch.randn(4, 1, tokens, 3, head, generator=generator, device=device)
    k = (k + 4 * mean[:, :1])[:, : tokens - 60]
    q, k, v = (x.to(dtype) for x in (q, k, v[:, : tokens - 60]))
    want = exact.attention(q, k, v)
    return float((BACKENDS[name](q, k, v).double() - want).norm() / want.norm())


@lru_cache(maxsize=32)
def works(name: str, dtype: torch.dtype, head: int, device: torch.device) -> bool:
    """Whether a backend passes the probe; the log says why not, once."""
    try:
        error = probe(name, dtype, head, device)
    except Exception as failure:  # any library may fail in any way: ours is the remedy
        log.warning("8-bit attention by %s passed over: %s: %s", name, type(failure).__name__, failure)
        return False
    if not error < TOLERANCE:
        log.warning("8-bit attention by %s passed over: relative error %.3g", name, error)
        return False
    log.info("8-bit attention by %s, head %d, %s: relative error %.3g", name, head, dtype, error)
    return True


def usual(device: torch.device) -> str:
    """Without a table's word: on Hopper the kernel for it, which the probe passes over where it can't run."""
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
    return HOPPER if hopper else OURS


@lru_cache(maxsize=256)
def choice(dtype: torch.dtype, head: int, tokens: int, device: torch.device) -> str:
    """The backend for so many keys on this device. RuntimeError where none gives right results."""
    named = tables.setting(TABLE, table_key(head, tokens), device, {"backend": usual(device)})["backend"]
    for name in dict.fromkeys((named, OURS)):
        if name in BACKENDS and works(name, dtype, head, device):
            return str(name)
    raise RuntimeError(f"no 8-bit attention gives right results for head {head} in {dtype} on {device}")

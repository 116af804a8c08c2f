"""The tuner's part for kernels bound by memory: norms, RoPE, the VAE's joins and doublings.

A pass is one kernel at one width, the settings that are tried for it, and what torch's reference gives for
the same inputs: a setting whose result is wrong is no candidate.
"""

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks._measure import burst
from benchmarks._tune_attention import randn
from kernels import tables
from kernels.norm_modulate import Norm
from kernels.norm_modulate import reference as plain_norm
from kernels.qk_norm_rope import SendLayout
from kernels.qk_norm_rope import reference as plain_qk
from kernels.vae_norm_silu import reference as plain_join
from kernels.vae_upsample import reference as plain_upsample

Made = Tensor | tuple[Tensor, ...]
Call = Callable[[], Made]
Entry = dict[str, Any]
RIGHT = 1e-2  # relative error to the reference: both round once to half precision
DIMS = {5120: 40, 3072: 24}  # width -> heads
NORM_SETTINGS = [(1, 4), (1, 8), (1, 16), (2, 8), (2, 16)]  # rows, warps
QK_SETTINGS = [(1, 4), (1, 8), (2, 4), (2, 8)]
VAE_SETTINGS = [(1024, 2), (1024, 4), (2048, 4), (4096, 4), (4096, 8), (8192, 8)]  # values a program, warps
VAE_SHAPES = {
    96: (4, 720, 1280),
    192: (4, 360, 640),
    384: (4, 180, 320),
    256: (4, 352, 640),
    512: (4, 176, 320),
}


@dataclass(frozen=True)
class Pass:
    """One kernel at one width: ours with the setting in force, and the reference on the same inputs."""

    op: str
    key: str
    entries: list[Entry]
    ours: Call
    want: Call
    reset: Callable[[], object] = lambda: None  # before a check: inputs that a call moves on are as at first


class NothingRight(RuntimeError):
    """No setting of a kernel gave the reference's result: no table is written."""


def force(op: str, key: str, entry: Entry) -> None:
    """Make the kernels of this process use `entry` for (op, key)."""
    tables.load(torch.cuda.get_device_name()).setdefault(op, {})[key] = entry
    tables._setting.cache_clear()


def right(got: Made, want: Made) -> bool:
    """Whether it is the reference's but for rounding, all tensors of it; NaN never is."""
    if isinstance(got, tuple) or isinstance(want, tuple):
        return len(got) == len(want) and all(right(*pair) for pair in zip(got, want, strict=True))
    return bool((got.float() - want.float()).norm() < RIGHT * want.float().norm())


def fastest(one: Pass) -> Entry:
    """The entry with which a pass is right and fastest, with its milliseconds. Raises NothingRight."""
    timed, want = [], one.want()
    for entry in one.entries:
        force(one.op, one.key, entry)
        one.reset()
        if not right(one.ours(), want):
            print(f"wrong result: {one.op} {one.key} {entry}", file=sys.stderr)
            continue
        timed.append(entry | {"ms": round(burst(one.ours), 4)})
    if not timed:
        raise NothingRight(f"{one.op} {one.key}: none of {one.entries} gives the reference's result")
    best = min(timed, key=lambda entry: float(entry["ms"]))
    force(one.op, one.key, best)
    print(f"{one.op} {one.key}: {best}  of {[t['ms'] for t in timed]}", file=sys.stderr, flush=True)
    return best


def norm_passes(rows: int = 9450) -> Iterable[Pass]:
    """The transformer's, at both models' widths."""
    from kernels.norm_modulate import triton as norm
    from kernels.qk_norm_rope import triton as qk

    for dim, heads in DIMS.items():
        x, y, gate = randn(1, rows, dim), randn(1, rows, dim).bfloat16(), randn(1, 1, dim)
        args = (x, y, gate, Norm(randn(1, 1, dim), randn(1, 1, dim), 1e-6), torch.bfloat16)
        entries = [{"rows": r, "warps": w} for r, w in NORM_SETTINGS]
        yield Pass(
            "norm_modulate", f"{dim}", entries,
            partial(norm.add_normalize, *args),
            partial(plain_norm.add_normalize, *args),
        )  # fmt: skip
        qkv, weight, angle = randn(1, rows, 3 * dim).bfloat16(), randn(dim), randn(rows, 64)
        turned = (qkv, weight, weight, (angle.cos(), angle.sin()), SendLayout.of(heads, 8), 1e-6)
        entries = [{"rows": r, "warps": w} for r, w in QK_SETTINGS]
        yield Pass(
            "qk_norm_rope", f"{dim}", entries,
            partial(qk.qk_norm_rope, *turned),
            partial(plain_qk.qk_norm_rope, *turned),
        )  # fmt: skip
        yield Pass(
            "rms_norm", f"{dim}", entries,
            partial(qk.rms_norm, y, weight, 1e-6),
            partial(plain_qk.rms_norm, y, weight, 1e-6),
        )  # fmt: skip


def vae_passes(small: bool = False) -> Iterable[Pass]:
    """The VAE's: a residual block's sum, norm, SiLU and cached frames; a doubled map's phases.

    `small` maps compile the same kernels.
    """
    from kernels.vae_norm_silu import triton as join
    from kernels.vae_upsample import triton as upsample

    last = torch.channels_last_3d
    for channels, shape in VAE_SHAPES.items():
        frames, height, width = (4, 16, 32) if small else shape
        x, shortcut = (
            randn(1, channels, frames, height, width).half().contiguous(memory_format=last) for _ in range(2)
        )
        out = x.new_empty(1, channels, frames + 2, height, width).contiguous(memory_format=last)
        past = randn(1, channels, 2, height, width).half().contiguous(memory_format=last)
        first = past.clone()  # a call leaves its last frames there
        rest = (past, randn(channels).half(), shortcut, randn(channels).half(), True, False)
        entries = [{"block": b, "warps": w} for b, w in VAE_SETTINGS]
        yield Pass(
            "vae_norm_silu", f"{channels}", entries,
            lambda x=x, out=out, rest=rest: (join.join(x, out, *rest), out)[1],  # type: ignore[misc]
            lambda x=x, out=out, rest=rest, first=first: _joined(x, out, (first, *rest[1:])),  # type: ignore[misc]
            lambda past=past, first=first: past.copy_(first),  # type: ignore[misc]
        )  # fmt: skip
        phases = randn(frames, 4 * channels, height // 2 + 1, width // 2 + 1).half()
        phases = phases.contiguous(memory_format=torch.channels_last)
        yield Pass(
            "vae_upsample", f"{channels}", entries,
            partial(upsample.interleave, phases, rest[1]),
            partial(plain_upsample.interleave, phases, rest[1]),
        )  # fmt: skip


def _joined(x: Tensor, like: Tensor, rest: tuple[Any, ...]) -> Tensor:
    past, *others = rest
    out = torch.empty_like(like)
    plain_join.join(x, out, past.clone(), *others)
    return out

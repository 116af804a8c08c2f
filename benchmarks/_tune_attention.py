"""The tuning table's attention: in bf16, in 8 bits, and with the VAE's wide heads."""

import math
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks._measure import burst
from benchmarks._verify import sampled_error
from kernels.attention import BACKENDS, Choice, probe
from kernels.attention.waves import Tile
from kernels.attention_8bit import choice as eight

WIDE = {"num_threads": 512}  # three warp groups of 64 queries
IN_TURN = WIDE | {"mma_pv_is_rs": True, "intra_wg_overlap": False}  # a group's products, then its softmax
SELF_ATTENTION: list[Choice] = [
    ("flash4", WIDE | {"tile_mn": [192, 128], "mma_pv_is_rs": False}),
    *(
        ("flash4", options | {"softmax": softmax})
        for softmax in ("lazy", "settled")
        for options in (
            WIDE | {"tile_mn": [192, 128], "mma_pv_is_rs": False},
            IN_TURN | {"tile_mn": [192, 128]},
            WIDE | {"tile_mn": [192, 80]},
            {"tile_mn": [128, 176], "num_threads": 384},
            {},
        )
    ),
    ("flash4", {}),
    ("cudnn", {}),
    ("flash2", {}),
]
EIGHT_TILES = [
    (128, 128, 8, 3),
    (128, 128, 8, 2),
    (64, 128, 4, 3),
    (64, 128, 4, 2),
    (128, 64, 8, 4),
    (64, 64, 4, 4),
]
CROSS_ATTENTION: list[Choice] = [("cudnn", {}), ("flash4", {}), ("flash2", {})]


def randn(*shape: int) -> Tensor:
    """Random normal values on the GPU; never zeros, which run faster."""
    return torch.randn(*shape, device="cuda")


def tune_attention(quick: bool) -> dict[str, Any]:
    """The fastest right backend for self- and cross-attention at head dimension 128."""
    device, entries = torch.device("cuda"), {}
    hopper = torch.cuda.get_device_capability()[0] == 9  # another's kernel has a softmax of its own
    length = 9450 if quick else 75600
    cases = {"self 128": (SELF_ATTENTION, length, length, 5), "cross 128": (CROSS_ATTENTION, 9450, 512, 40)}
    for key, (choices, queries, keys, heads) in cases.items():
        q, (k, v) = randn(1, queries, heads, 128).bfloat16(), randn(2, 1, keys, heads, 128).bfloat16()
        timed = []
        for name, options in choices:
            if "softmax" in options and not hopper:
                continue
            try:
                if not probe((name, options), torch.bfloat16, 128, device) < 1e-2:
                    continue
                backend = BACKENDS[name]
                ms = burst(lambda b=backend, o=options, q=q, k=k, v=v: b(q, k, v, o), 200, 600)
            except Exception as failure:  # a library that isn't there is no candidate
                print(f"attention {key} {name}: {type(failure).__name__}: {failure}"[:200], file=sys.stderr)
                continue
            timed.append({"backend": name, "options": options, "ms": round(ms, 4)})
            print(f"attention {key}: {timed[-1]}", file=sys.stderr, flush=True)
        entries[key] = attention_entry(timed, heads, queries)
    return entries


def attention_entry(timed: list[dict[str, Any]], heads: int, queries: int) -> dict[str, Any]:
    """The table's entry: the fastest, what all took, and the fastest of each height of the same backend.

    Another height may suit a shape better whose last wave the fastest leaves empty.
    """
    timed = sorted(timed, key=lambda entry: entry["ms"])
    best, others = timed[0], {f"{t['backend']} {t['options'] or ''}".strip(): t["ms"] for t in timed}
    tiles: dict[int, Tile] = {}
    for entry in timed:
        if entry["backend"] == best["backend"] == "flash4":
            tile = Tile(entry["options"], entry["ms"], heads, queries)
            tiles.setdefault(tile.rows, tile)
    shapes = {"heads": heads, "queries": queries} | {
        "tiles": [{"options": tile.options, "ms": tile.ms} for tile in tiles.values()]
    }
    return best | (shapes if len(tiles) > 1 else {}) | {"others": others}


def tune_tiles_8bit(quick: bool) -> dict[str, Any]:
    """Entries by operation: the fastest right tile of each of our 8-bit kernels at head dimension 128."""
    from kernels.attention_8bit import triton

    kernels = {"attention_8bit": (triton.attention, [triton.Tile(*tile) for tile in EIGHT_TILES])}
    if eight.usual(torch.device("cuda")) == eight.HOPPER:
        from kernels.attention_8bit import hopper

        tiles = [hopper.Tile(), hopper.Tile(ping=True), hopper.Tile(magic=True), hopper.Tile(stages=6)]
        kernels["attention_8bit_hopper"] = (hopper.attention, tiles)  # type: ignore[assignment]
    q, k, v = randn(3, 1, 9450 if quick else 75600, 5, 128).bfloat16().unbind(0)
    entries: dict[str, Any] = {}
    for op, (attend, tiles) in kernels.items():
        timed = []
        for tile in tiles:
            call: Callable[[], Tensor] = partial(attend, q, k, v, tile)  # type: ignore[arg-type]
            error = sampled_error(call(), q, k, v)
            if not error < eight.TOLERANCE:
                print(f"wrong result: {op} {tile}: relative error {error:.3g}", file=sys.stderr)
                continue
            timed.append((burst(call, 200, 400), tile))
            print(f"{op} {tile}: {timed[-1][0]:.3f} ms, error {error:.4f}", file=sys.stderr, flush=True)
        if timed:
            ms, best = min(timed, key=lambda pair: pair[0])
            entries[op] = {"128": asdict(best) | {"ms": round(ms, 4)}}
    return entries


def tune_attention_8bit(quick: bool) -> dict[str, Any]:
    """The fastest right 8-bit self-attention of an 8-GPU share of 720p and 480p: ours, or a library's."""
    entries = {}
    for tokens in (9450,) if quick else (75600, 32760):
        q, k, v = randn(3, 1, tokens, 5, 128).bfloat16().unbind(0)
        times = {}
        for name, backend in eight.BACKENDS.items():
            wrong = eight_fault(name, backend, q, k, v)
            if wrong:
                print(f"8-bit attention {tokens} {name}: {wrong}"[:300], file=sys.stderr, flush=True)
                continue
            times[name] = burst(lambda b=backend, q=q, k=k, v=v: b(q, k, v), 200, 600)
        if times:
            entries[eight.table_key(128, tokens)] = eight_entry(times)
            print(f"8-bit attention {tokens}: {times}", file=sys.stderr, flush=True)
    return entries


def eight_fault(name: str, backend: eight.Attend, q: Tensor, k: Tensor, v: Tensor) -> str:
    """What is wrong with a backend by the probe, or at this real length on a few queries; "" for nothing."""
    try:
        small = eight.probe(name, q.dtype, q.shape[-1], q.device)
        real = sampled_error(backend(q, k, v), q, k, v)
    except Exception as failure:  # a library that isn't there is no candidate
        return f"{type(failure).__name__}: {failure}"
    print(f"8-bit attention {name}: relative error {small:.4f}, at {q.shape[1]} {real:.4f}", file=sys.stderr)
    return "" if max(small, real) < eight.TOLERANCE else f"relative error {small:.3g} and {real:.3g}"


def eight_entry(times: dict[str, float]) -> dict[str, Any]:
    """The table's entry of right backends' milliseconds: bursts differ by 2 %, a library must win by more."""
    best = min(times, key=times.__getitem__)
    close = eight.OURS in times and not times[best] < 0.98 * times[eight.OURS]
    entry = {"backend": eight.OURS if close else best}
    return entry | {f"{name}_ms": round(ms, 4) for name, ms in times.items()}


def tune_wide_attention() -> dict[str, Any]:
    """Torch's choice or our form for the VAE's one head, over a frame of 1280x720."""
    from kernels.wide_attention import reference as library
    from kernels.wide_attention import triton as ours

    entries = {}
    for head, pixels in {384: 90 * 160, 1024: 44 * 80}.items():
        q, k, v = randn(1, 1, pixels, 3 * head).half().chunk(3, dim=-1)
        want = library.attention(q, k, v).float()
        times = {"library_ms": round(burst(lambda q=q, k=k, v=v: library.attention(q, k, v)), 4)}
        if (ours.attention(q, k, v).float() - want).norm() < 2e-3 * want.norm():
            times["ours_ms"] = round(burst(lambda q=q, k=k, v=v: ours.attention(q, k, v)), 4)
        won = times.get("ours_ms", math.inf) < 0.98 * times["library_ms"]
        entries[f"{head}"] = {"backend": "triton" if won else "library"} | times
        print(f"wide attention {head}: {times}", file=sys.stderr, flush=True)
    return entries

"""Makes a tuning table for this GPU: per op and shape the fastest of our settings and the library's.

    python -m benchmarks.tune [--out kernels/tuned/NAME.json] [--quick]
    python -m benchmarks.tune --only norms vae & python -m benchmarks.tune --only gemm    side by side

Candidates are ranked by bursts (the same power state for all); a candidate whose result is wrong is left
out. For a product the table says which backend won and keeps both times, so a kernel of ours that loses
stays out of the hot path and the table shows by how much.
"""

import argparse
import datetime
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks._measure import burst
from benchmarks._tune_attention import (
    randn,
    tune_attention,
    tune_attention_8bit,
    tune_tiles_8bit,
    tune_wide_attention,
)
from benchmarks._tune_convolutions import tune_flat
from benchmarks._tune_passes import fastest, force, norm_passes, vae_passes
from kernels import gemm, tables
from kernels.attention_8bit.choice import TABLE
from kernels.gemm import reference
from kernels.norm_modulate import Norm, add_normalize, normalize

Call = Callable[[], Tensor]
PRODUCTS = [(15360, 5120), (5120, 5120), (13824, 5120), (5120, 13824)]
PRODUCTS_5B = [(9216, 3072), (3072, 3072), (14336, 3072), (3072, 14336)]
ROWS = (9450, 4095, 18900, 37800, 75600)
ROWS_5B = (3410, 27280)


def tiles() -> list[Any]:
    """Tiles of our product that are tried."""
    from kernels.gemm.triton import Tile

    return [
        Tile(128, 256, 64, stages=3, halves=False),
        Tile(128, 256, 64, stages=4, halves=True),
        Tile(256, 128, 64, stages=3, halves=False),
        Tile(128, 128, 64, stages=4, warps=4, halves=False),
    ]


def product_call(epilogue: str, x: Tensor, weight: Tensor, bias: Tensor, tile: Any) -> Call:
    """Our product (`tile`) or the library's (None)."""
    from kernels.gemm import triton

    n = weight.shape[0]
    if epilogue == "gated":
        # A norm follows in the model, so the rival is the library's product and the fused join with it.
        torch.manual_seed(n)  # the same operands for both
        residual, gate = randn(1, x.shape[1], n), randn(1, 1, n)
        norm = Norm(randn(1, 1, n), randn(1, 1, n), 1e-6)
        if tile is None:
            return lambda: add_normalize(residual, reference.linear(x, weight, bias), gate, norm, x.dtype)[1]
        return lambda: normalize(
            triton.product(x, weight, bias, triton.GATED, tile, residual, gate), norm, x.dtype
        )
    if tile is None:
        library = reference.library_gelu if epilogue == "gelu" else reference.linear
        return lambda: library(x, weight, bias)
    kind = triton.GELU if epilogue == "gelu" else triton.BIAS
    return lambda: triton.product(x, weight, bias, kind, tile)


def tune_product(epilogue: str, rows: int, n: int, k: int) -> dict[str, Any]:
    """The table's entry of one product: the winner, and the times of the library and of our best tile."""
    x, weight, bias = randn(1, rows, k).bfloat16(), (randn(n, k) / k**0.5).bfloat16(), randn(n).bfloat16()
    library = product_call(epilogue, x, weight, bias, None)
    want, library_ms = library().float(), burst(library)
    ours: tuple[float, Any] | None = None
    for tile in tiles()[:1] if epilogue == "gelu" else tiles()[1:2] if epilogue == "gated" else tiles():
        if epilogue == "gated":
            tile = type(tile)(**(asdict(tile) | {"stages": 3, "halves": True}))
        call = product_call(epilogue, x, weight, bias, tile)
        if not (call().float() - want).norm() < 1e-2 * want.norm():
            print(f"wrong result: {epilogue} {rows}x{n}x{k} {tile}", file=sys.stderr)
            continue
        ms = burst(call)
        ours = min(ours or (ms, tile), (ms, tile), key=lambda pair: pair[0])
    times = {"library_ms": round(library_ms, 4)} | ({"ours_ms": round(ours[0], 4)} if ours else {})
    print(f"product {epilogue} {rows}x{n}x{k}: {times} {ours and ours[1]}", file=sys.stderr, flush=True)
    if ours and ours[0] < 0.98 * library_ms:  # bursts differ by 1 to 2 % from run to run
        return {"backend": "triton", "tile": asdict(ours[1])} | times
    return {"backend": "library"} | times


def tune_products(quick: bool) -> dict[str, Any]:
    """Entries by key for the shapes of both models."""
    entries = {}
    shapes = [(rows, n, k) for rows in ROWS for n, k in PRODUCTS]
    shapes += [(rows, n, k) for rows in ROWS_5B for n, k in PRODUCTS_5B]
    for rows, n, k in shapes[:4] if quick else shapes:
        # The up-projection takes GELU, everything else a bias; the gated form competes for the down one.
        kinds = ["gelu"] if n > k and n in (13824, 14336) else ["bias"]
        kinds += ["gated"] if k in (13824, 14336) else []
        for epilogue in kinds:
            entries[gemm.table_key(epilogue, rows, n, k)] = tune_product(epilogue, rows, n, k)
    return entries


def compile_ahead(index: int) -> None:
    """Compile one slice of all candidates into Triton's disk cache (run in parallel processes)."""
    jobs: list[Callable[[], object]] = []
    for one in [*norm_passes(), *vae_passes(small=True)]:
        jobs += [lambda o=one, e=entry: (force(o.op, o.key, e), o.ours()) for entry in one.entries]
    for rows, n, k in ((256, 512, 512), (256, 512, 256)):
        x, weight, bias = randn(1, rows, k).bfloat16(), randn(n, k).bfloat16(), randn(n).bfloat16()
        for epilogue in ("bias", "gelu"):
            jobs += [product_call(epilogue, x, weight, bias, tile) for tile in tiles()]
    for job in jobs[index :: os.cpu_count() or 1]:
        job()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, help="the table's file; default: beside the shipped ones")
    parser.add_argument("--quick", action="store_true", help="a few products and a short sequence")
    parser.add_argument("--only", nargs="*", default=[], help="operations to tune; others keep theirs")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.tune needs a CUDA GPU; torch sees none")
    device = torch.cuda.get_device_name()
    out = arguments.out or tables.FOLDER / tables.file_name(device)
    wanted = set(arguments.only) or {"norms", "vae", "gemm", "attention"}
    ops: dict[str, dict[str, Any]] = {}
    with torch.no_grad():
        if wanted & {"norms", "vae", "gemm"}:
            workers = os.cpu_count() or 1
            with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
                list(pool.map(compile_ahead, range(workers)))
        for one in (
            *(norm_passes() if "norms" in wanted else ()),
            *(vae_passes() if "vae" in wanted else ()),
        ):
            ops.setdefault(one.op, {})[one.key] = fastest(one)
        if "gemm" in wanted:
            ops.setdefault("gemm", {}).update(tune_products(arguments.quick))
        if "vae" in wanted:
            ops["wide_attention"] = tune_wide_attention()
            ops["vae_flat"] = tune_flat()
        if "attention" in wanted:
            ops.setdefault("attention", {}).update(tune_attention(arguments.quick))
            for op, entries in tune_tiles_8bit(arguments.quick).items():
                ops[op] = entries
                force(op, "128", entries["128"])  # the rivals meet it at its best
            ops.setdefault(TABLE, {}).update(tune_attention_8bit(arguments.quick))
    tables.update(out, device, f"{datetime.date.today()}, torch {torch.__version__}, bursts", ops)
    print(out)


if __name__ == "__main__":
    main()

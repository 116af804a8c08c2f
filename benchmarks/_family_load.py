"""The family benchmark's loading: fp32 safetensors written on the spot, ours against a plain read of them."""

import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from benchmarks._disk import cached, drop, filesystem, in_memory, plain_read
from benchmarks._family_bench import Bench, median_of, say
from benchmarks._random_model import RandomState
from engine.checkpoint_writer import write_expert
from engine.config import DiTConfig
from engine.dit import DiT, stays_fp32
from engine.transfer import THREADS, Meter
from engine.weights import Reader, safetensors_files, scan

SHARDS = 12
ROUNDS = 3  # at the most
AGAIN_SECONDS = 150  # another round begins only if it would end in that time from the section's start
THREADED = f"plain, {THREADS} threads"
COLD = 0.05  # of the files' pages at the most are in memory when a read counts as cold


def load_section(bench: Bench, folder: Path, gigabytes: float) -> None:
    """Write the files, then read and load them in turn: first what is asked for, then again while time lasts.

    Cold reads come only where the page cache could be dropped: the result says so.
    """
    config = config_of(bench, gigabytes)
    bench.emit("folder", {"filesystem": filesystem(folder), "in_memory": in_memory(folder)})
    room = shutil.disk_usage(folder).free / 1e9
    if room < 1.02 * gigabytes:
        raise OSError(f"{folder} has {room:.1f} GB free, {gigabytes:g} GB are to be written there: --folder")
    began = time.perf_counter()
    write_expert(folder, config, "t2v", RandomState(config, bench.device), shards=SHARDS)
    paths = safetensors_files(folder)
    size = sum(path.stat().st_size for path in paths) / 1e9
    written = {"gigabytes": size, "files": len(paths), "seconds": time.perf_counter() - began}
    say(f"wrote {written}")
    bench.emit("written", written)
    rates: dict[str, list[float]] = {}
    cold = is_cold(bench, folder, paths)
    states = ("cold", "warm") if cold else ("warm",)
    passes = [(state, kind) for state in states for kind in ("plain", "load")]
    for number in range(ROUNDS):
        round_began = time.perf_counter()
        for state, kind in [*passes, *((state, THREADED) for state in states)] if number == 0 else passes:
            if state == "cold" and (number or kind != "plain") and not is_cold(bench, folder, paths):
                continue  # the first was dropped already
            rate = loading_rate(bench, folder, config) if kind == "load" else plain(paths, kind)
            say(f"{state} {kind}: {rate:.2f} GB/s")
            rates.setdefault(f"{state} {kind}", []).append(rate)
            bench.emit("gb_per_s", rates)
            bench.emit("ratio_to_plain_read", ratios(rates))
        took, spent = time.perf_counter() - round_began, time.perf_counter() - began
        if spent + took > AGAIN_SECONDS or bench.left < 1.2 * took:
            break


def config_of(bench: Bench, gigabytes: float) -> DiTConfig:
    """As many of the A14B's blocks as make so many fp32 gigabytes or a little more."""
    config = bench.shapes["A14B"].dit
    with torch.device("meta"):
        model = DiT(replace(config, num_layers=1))
    block = 4 * sum(p.numel() for p in model.blocks[0].parameters())
    rest = 4 * sum(p.numel() for p in model.parameters()) - block
    return replace(config, num_layers=max(1, -int(-(gigabytes * 1e9 - rest) // block)))


def is_cold(bench: Bench, folder: Path, paths: list[Path]) -> bool:
    """Drop the page cache of the files, and look whether it is gone; the look is part of the result."""
    if in_memory(folder):
        bench.emit("cold", {"possible": False, "why": f"the files lie in memory ({filesystem(folder)})"})
        return False
    drop(paths)
    share = cached(paths)
    cold = share is not None and share <= COLD
    why = "the page cache's state is unknown here" if share is None else f"{share:.1%} of the pages cached"
    bench.emit("cold", {"possible": cold, "why": f"{why} after posix_fadvise(DONTNEED)"})
    return cold


def plain(paths: list[Path], kind: str) -> float:
    """GB/s of a plain read, by one thread or by as many as load."""
    return plain_read(paths, THREADS if kind == THREADED else 1)


def ratios(rates: dict[str, list[float]]) -> dict[str, float]:
    """Ours to each kind of plain read, of the medians that exist."""
    found = {}
    for state in ("cold", "warm"):
        ours = median_of(rates, f"{state} load")
        for kind in ("plain", THREADED):
            other = median_of(rates, f"{state} {kind}")
            if ours is not None and other is not None:
                found[f"{state}, to {kind}"] = ours / other
    return found


def loading_rate(bench: Bench, folder: Path, config: Any) -> float:
    """GB/s of files that become a model on the device; one tensor is compared with the file."""
    entries, meter = scan(safetensors_files(folder)), Meter()
    with torch.device("meta"):
        model = DiT(config)
    with meter.running():
        Reader(bench.device, meter=meter).fill(
            model, entries, lambda name: torch.float32 if stays_fp32(name) else bench.dtype
        )
    name = "blocks.0.ffn.2.weight"
    with safe_open(entries[name].path, framework="pt") as file:
        expected = file.get_tensor(name).to(bench.dtype)
    if not torch.equal(dict(model.named_parameters())[name].cpu(), expected):
        raise RuntimeError(f"{name} was loaded wrong: no rate is reported")
    return meter.rate

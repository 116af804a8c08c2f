"""Timing on several ranks at once: all do the same number of steps, and the slowest rank's time counts."""

import itertools
import math
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from benchmarks._measure import Sampler, profile


@dataclass(frozen=True)
class Timed:
    """Medians of continuous work; clock and power are those of rank 0's GPU."""

    ms: float
    spread_ms: float  # between the slowest and the fastest tenth of the repetitions
    repetitions: int
    seconds: float
    clock_mhz: float
    power_w: float
    peak_gib: float  # most memory that tensors took on rank 0
    parts: dict[str, float]  # kind of kernel -> ms of a repetition on rank 0; empty on a CPU

    def json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)


def shared(value: float, device: torch.device, op: dist.ReduceOp.RedOpType = dist.ReduceOp.MAX) -> float:
    """The largest (or other) of all ranks' values."""
    box = torch.tensor([value], dtype=torch.float64, device=device)
    dist.all_reduce(box, op)
    return float(box.item())


def together(
    step: Callable[[], object], seconds: float, device: torch.device, warm: float = 3.0, parts: bool = True
) -> Timed:
    """Run `step` for `warm` seconds untimed, then for `seconds` timed, without a pause, on all ranks."""
    cuda = device.type == "cuda"

    def finish() -> None:
        if cuda:
            torch.cuda.synchronize(device)

    step()  # compiles, tunes, allocates
    finish()
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    dist.barrier()
    begin = time.perf_counter()
    step()
    finish()
    once = shared(time.perf_counter() - begin, device)
    marks: list[Any] = []
    sampler: AbstractContextManager[Any] = Sampler() if cuda else nullcontext()
    for _ in range(math.ceil(min(warm, seconds) / once)):
        step()
    with sampler:
        start = time.perf_counter()
        for _ in range(max(1, math.ceil(seconds / once)) + 1):
            marks.append(_mark(cuda))
            step()
        marks.append(_mark(cuda))
        finish()
        elapsed = time.perf_counter() - start
    times = sorted(_between(a, b) for a, b in itertools.pairwise(marks))
    clock, power = sampler.medians() if cuda else (math.nan, math.nan)
    tenth = len(times) // 10
    return Timed(
        ms=shared(statistics.median(times), device),
        spread_ms=times[-1 - tenth] - times[tenth],
        repetitions=len(times),
        seconds=elapsed,
        clock_mhz=clock,
        power_w=power,
        peak_gib=torch.cuda.max_memory_allocated(device) / 2**30 if cuda else math.nan,
        parts=profile(step) if cuda and parts else {},
    )


def _mark(cuda: bool) -> Any:
    if not cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(first: Any, last: Any) -> float:
    return (last - first) * 1e3 if isinstance(first, float) else float(first.elapsed_time(last))

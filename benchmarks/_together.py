"""Timing on several ranks at once: all do the same number of steps, and the slowest rank's time counts."""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from benchmarks._expected import repetitions
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
        parts=profile(step, repetitions(once)) if cuda and parts else {},
    )


def alternately(
    steps: Sequence[Callable[[], object]], seconds: float, device: torch.device, warm: float = 3.0
) -> list[Timed]:
    """Steps by turns, `seconds` of each in all, so that the card's heat and power are the same for each.

    Each turn is waited for on all ranks, and the clock and power of its own turns stand beside each step.
    """
    cuda = device.type == "cuda"

    def turn(step: Callable[[], object]) -> float:
        first = _mark(cuda)
        step()
        last = _mark(cuda)
        if cuda:
            torch.cuda.synchronize(device)
        dist.barrier()
        return _between(first, last)

    for step in steps:
        turn(step)  # compiles, tunes, allocates
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    once = shared(sum(turn(step) for step in steps) / 1e3, device)
    for _ in range(math.ceil(min(warm, seconds) / once)):
        for step in steps:
            turn(step)
    times: list[list[float]] = [[] for _ in steps]
    samples: list[list[slice]] = [[] for _ in steps]
    with Sampler() if cuda else nullcontext() as sampler:
        start = time.perf_counter()
        for _ in range(max(2, math.ceil(len(steps) * seconds / once))):
            for step, mine, taken in zip(steps, times, samples, strict=True):
                before = sampler.taken if sampler else 0
                mine.append(turn(step))
                taken.append(slice(before, sampler.taken if sampler else 0))
        elapsed = time.perf_counter() - start
    return [
        Timed(
            ms=shared(statistics.median(mine), device),
            spread_ms=max(mine) - min(mine),
            repetitions=len(mine),
            seconds=elapsed,
            clock_mhz=sampler.medians(taken)[0] if sampler else math.nan,
            power_w=sampler.medians(taken)[1] if sampler else math.nan,
            peak_gib=torch.cuda.max_memory_allocated(device) / 2**30 if cuda else math.nan,
            parts={},
        )
        for mine, taken in zip(times, samples, strict=True)
    ]


def _mark(cuda: bool) -> Any:
    if not cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(first: Any, last: Any) -> float:
    return (last - first) * 1e3 if isinstance(first, float) else float(first.elapsed_time(last))

"""Timing on a GPU that is limited by power: bursts for tuning, sustained runs for every claim.

A burst of a few calls runs at a clock that no long run keeps, so figures come from seconds of continuous
work, with the clock and the power of that time beside them.
"""

import itertools
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

Step = Callable[[], object]  # one repetition

# A kernel's kind by what its name contains, first match first.
KINDS = {
    "attention": ("flash", "fmha", "sdpa", "attention", "mha_"),
    "products": ("gemm", "nvjet", "cutlass", "xmma", "splitk"),
    "copies": ("memcpy", "direct_copy", "memset"),
}


@dataclass(frozen=True)
class Sustained:
    """What seconds of continuous work gave; medians, times in milliseconds."""

    ms: float
    parts: dict[str, float]  # kind of kernel -> milliseconds of one repetition, from a profile just after
    repetitions: int
    seconds: float
    clock_mhz: float
    power_w: float


@dataclass
class Sampler:
    """SM clock and board power from nvidia-smi, ten times a second, while the `with` block runs."""

    clocks: list[float] = field(default_factory=list)
    powers: list[float] = field(default_factory=list)

    def __enter__(self) -> "Sampler":
        # By its own number: where CUDA sees some of the GPUs, its indices are not nvidia-smi's.
        card = f"GPU-{torch.cuda.get_device_properties().uuid}"
        query = ["--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits", "-lms", "100"]
        self._process = subprocess.Popen(
            ["nvidia-smi", "-i", card, *query], stdout=subprocess.PIPE, text=True
        )
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        return self

    def _read(self) -> None:
        for line in self._process.stdout or ():
            try:
                clock, power = (float(part) for part in line.split(","))
            except ValueError:  # "[N/A]" where a driver hides a value
                continue
            self.clocks.append(clock)
            self.powers.append(power)

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()
        self._thread.join(5)

    @property
    def taken(self) -> int:
        """How many samples there are so far."""
        return len(self.powers)

    def medians(self, parts: Sequence[slice] = (slice(None),)) -> tuple[float, float]:
        """(clock in MHz, power in W) of these parts of the samples; NaN where nothing was read."""
        clocks, powers = ([x for part in parts for x in of[part]] for of in (self.clocks, self.powers))
        nan = [float("nan")]
        return statistics.median(clocks or nan), statistics.median(powers or nan)


def kind_of(kernel: str) -> str:
    """attention, products, copies or elementwise, by a kernel's name."""
    name = kernel.lower()
    return next((kind for kind, marks in KINDS.items() if any(m in name for m in marks)), "elementwise")


def profile_kernels(step: Step, repetitions: int = 5) -> dict[str, float]:
    """Milliseconds of one repetition by kernel."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as trace:
        for _ in range(repetitions):
            step()
        torch.cuda.synchronize()
    times = {e.key: e.self_device_time_total / 1e3 / repetitions for e in trace.key_averages()}
    return {name: ms for name, ms in sorted(times.items(), key=lambda item: -item[1]) if ms > 0}


def profile(step: Step, repetitions: int = 5) -> dict[str, float]:
    """Milliseconds of one repetition by kind of kernel."""
    parts: dict[str, float] = {}
    for kernel, ms in profile_kernels(step, repetitions).items():
        parts[kind_of(kernel)] = parts.get(kind_of(kernel), 0.0) + ms
    return parts


def sustained(step: Step, seconds: float) -> Sustained:
    """Run `step` for up to 3 s untimed and then `seconds` timed, without a pause between.

    Repetitions are queued in batches of about 0.2 s, two batches ahead, so the GPU never waits for the host.
    """
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    batch = max(1, int(0.2 / max((time.perf_counter() - begin) / 3, 1e-4)))
    while time.perf_counter() - begin < min(3.0, seconds):
        for _ in range(batch):
            step()
        torch.cuda.synchronize()
    times: list[float] = []
    queued: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
    with Sampler() as sampler:
        start = time.perf_counter()
        while time.perf_counter() - start < seconds:
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            first.record()
            for _ in range(batch):
                step()
            last.record()
            waiting, queued = queued, (first, last)
            if waiting is not None:
                waiting[1].synchronize()
                times.append(waiting[0].elapsed_time(waiting[1]) / batch)
        torch.cuda.synchronize()
        elapsed = time.perf_counter() - start
    clock, power = sampler.medians()
    return Sustained(statistics.median(times), profile(step), (len(times) + 1) * batch, elapsed, clock, power)


def burst(call: Callable[[], object], warm_ms: float = 30, measure_ms: float = 100) -> float:
    """Median milliseconds of a call over a short run: good for ranking candidates, not for claims.

    A few big products go ahead of the calls, so that launching them takes no time that counts.
    """
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    torch.cuda.synchronize()
    once = max(time.perf_counter() - begin, 2e-5)
    for _ in range(max(1, int(warm_ms / 1e3 / once))):
        call()
    count = max(5, int(measure_ms / 1e3 / once))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    head_start = torch.randn(8192, 8192, device="cuda").bfloat16()  # 1.4 ms a product
    for _ in range(int(count * min(once, 2e-4) / 1.4e-3) + 1):
        head_start @ head_start
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events))

"""What every section of the family benchmark needs: the device, the clock, memory, and where figures go."""

import math
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

from benchmarks._random_model import FULL, TINY, Shape, layout_of
from engine.ladder import free_memory
from engine.memory import GIB, MemoryPlan, Rung, make_plan, sizes_of
from engine.parallel.mesh import Mesh

Emit = Callable[[str, Any], None]  # (name of a part, its figures); the same name again replaces them


class Bench:
    """The device and the sizes of one section's run; `emit` gets each figure as soon as it exists."""

    def __init__(self, emit: Emit, *, tiny: bool, seconds: float = math.inf) -> None:
        self.emit, self.tiny = emit, tiny
        self.ends = time.perf_counter() + seconds
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.on_gpu = self.device.type == "cuda"
        self.dtype = torch.bfloat16 if self.on_gpu else torch.float32
        self.vae_dtype = torch.float16 if self.on_gpu else torch.float32
        self.shapes = TINY if tiny else FULL

    @property
    def left(self) -> float:
        """Seconds until this section must end."""
        return self.ends - time.perf_counter()

    def part(self, name: str, work: Callable[[], dict[str, Any]]) -> bool:
        """Emit what `work` gives, with the peaks of its memory, or how it failed; tells whether it worked."""
        failure = None
        self.memory()
        try:
            result = work() | self.memory()
        except Exception as error:  # a part that fails is a result too, and the next one goes on
            traceback.print_exc()
            failure = failed(error)
        if failure is not None:  # here the error's frames no longer hold their tensors
            if self.on_gpu:
                torch.cuda.empty_cache()
            result = failure
        say(f"{name}: {result}")
        self.emit(name, result)
        return failure is None

    def timed(self, work: Callable[[], object]) -> float:
        """Wall seconds of one call, to the end of the device's work."""
        self.wait()
        began = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - began

    def twice(self, work: Callable[[], object]) -> dict[str, float]:
        """Seconds of a first call, which compiles and plans, and of a second."""
        return {"first_seconds": self.timed(work), "seconds": self.timed(work)}

    def wait(self) -> None:
        """For the device's work to end."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def memory(self) -> dict[str, float]:
        """GiB since the last reset; `driver` is what the whole device has in use now, reserves included."""
        if not self.on_gpu:
            return {}
        free, total = torch.cuda.mem_get_info()
        peaks = {
            "allocated_peak_gib": torch.cuda.max_memory_allocated() / GIB,
            "reserved_peak_gib": torch.cuda.max_memory_reserved() / GIB,
            "driver_gib": (total - free) / GIB,
            "beside_torch_gib": (total - free - torch.cuda.memory_reserved()) / GIB,
        }
        torch.cuda.reset_peak_memory_stats()
        return peaks

    def plan(self, shape: Shape, rung: Rung) -> MemoryPlan:
        """The memory plan, printed."""
        layout = layout_of(shape)
        experts = [part.entries for part in (layout.high, layout.low) if part is not None]
        sizes = sizes_of(
            experts, layout.text.entries.values(), layout.vae.entries.values(), self.dtype, self.vae_dtype
        )
        available, host = free_memory(self.device, 1)
        plan = make_plan(
            shape.spec, sizes, Mesh.single(), rung, self.dtype, self.vae_dtype,
            on_gpu=self.on_gpu, available=available, host_available=host,
        )  # fmt: skip
        say(plan.table())
        return plan


def failed(error: BaseException) -> dict[str, str]:
    """How a part or a section failed, as its result."""
    lines = str(error).splitlines() or [""]
    return {"failed": f"{type(error).__name__}: {lines[0]}"}


def median_of(rates: dict[str, list[float]], name: str) -> float | None:
    """The median of what was measured under a name, if anything was."""
    return statistics.median(rates[name]) if rates.get(name) else None


def say(text: str) -> None:
    """Progress, on standard error."""
    print(text, file=sys.stderr, flush=True)

"""A node's memory, summed over its ranks: of its GPUs where it has any, else of its processes."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import psutil

from jobs.nodes import GpuUse


class Memory(NamedTuple):
    """Bytes over all of a node's ranks."""

    used: int
    total: int


def total_memory(gpus: Sequence[GpuUse], processes: Iterable[psutil.Process]) -> Memory | None:
    """The node's memory now; None when it can't be told."""
    if gpus:
        return Memory(sum(gpu.memory_used for gpu in gpus), sum(gpu.memory_total for gpu in gpus))
    return _resident(processes)


def _resident(processes: Iterable[psutil.Process]) -> Memory | None:
    used = 0
    for process in processes:
        try:
            used += process.memory_info().rss
        except psutil.Error:
            continue
    return Memory(used, psutil.virtual_memory().total) if used else None

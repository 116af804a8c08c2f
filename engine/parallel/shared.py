"""A window in memory that processes of one host share: the push transport on a CPU.

Copies happen at once, in the caller. On CPUs that order stores less strictly than x86 does, a counter could
be seen before the data; it is meant for tests and small machines.
"""

import os
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from engine.errors import RankLost

SPIN_SECONDS = 200e-6  # between two looks at a counter


class SharedWindow:
    """See `engine.parallel.push.Window`. The file is unlinked once all have mapped it."""

    def __init__(self, group: dist.ProcessGroup, timeout_seconds: float) -> None:
        self._group, self._timeout = group, timeout_seconds
        self._rank, self._ranks = dist.get_rank(group), dist.get_world_size(group)
        self._memory: list[Tensor] = []
        self._counters: list[Tensor] = []

    def reserve(self, size: int, counters: int) -> None:
        """One file with every rank's counters and bytes."""
        dist.barrier(group=self._group)  # nobody still needs the old memory
        stride = size + (4 * counters + 63) // 64 * 64
        box: list[str | None] = [None]
        if self._rank == 0:
            box[0] = _new_file(stride * self._ranks)
        dist.broadcast_object_list(box, group=self._group, group_src=0)
        assert box[0] is not None
        path = Path(box[0])
        whole = torch.from_file(str(path), shared=True, size=stride * self._ranks, dtype=torch.uint8)
        parts = whole.chunk(self._ranks)
        self._memory = [part[:size] for part in parts]
        self._counters = [part[size : size + 4 * counters].view(torch.int32) for part in parts]
        dist.barrier(group=self._group)
        if self._rank == 0:
            path.unlink()

    def memory(self, rank: int) -> Tensor:
        """A rank's bytes."""
        return self._memory[rank]

    def fence(self) -> None:
        """Nothing is asynchronous."""

    def copy(self, into_NM: Tensor, source_NM: Tensor) -> None:
        """Copy now."""
        into_NM.copy_(source_NM)

    def signal(self, rank: int, counter: int, value: int) -> None:
        """Set the counter now."""
        self._counters[rank][counter] = value

    def wait(self, counter: int, value: int) -> None:
        """Look until the counter is there. Raises RankLost."""
        counters = self._counters[self._rank]
        deadline = time.monotonic() + self._timeout
        while int(counters[counter]) < value:
            if time.monotonic() > deadline:
                raise RankLost(
                    f"a rank sent nothing for {self._timeout:.0f} s (counter {counter}): it is dead or hangs"
                )
            time.sleep(SPIN_SECONDS)

    def close(self) -> None:
        """Unmap."""
        self._memory, self._counters = [], []


def _new_file(size: int) -> str:
    """The path of a zeroed file of `size` bytes, in memory where the system has a place for that."""
    folder = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    handle, path = tempfile.mkstemp(prefix="reel-window-", dir=folder)
    os.truncate(handle, size)
    os.close(handle)
    return path

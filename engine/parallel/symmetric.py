"""A window in symmetric memory of NVLink-connected GPUs: the push transport's way on CUDA.

Copies go through copy engines on a stream of their own, so that no SM leaves its arithmetic. Multicast
stays off: nothing here needs it, and not every machine allows it.
"""

import os
import time

import torch
import torch.distributed as dist
from torch import Tensor

from engine.parallel import cuda_driver

NO_MULTICAST = {"TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NCCL_NVLS_ENABLE": "0"}


def keep_multicast_off() -> None:
    """For torch's symmetric memory and NCCL; must come before either starts."""
    for name, value in NO_MULTICAST.items():
        os.environ.setdefault(name, value)


class SymmetricWindow:
    """See `engine.parallel.push.Window`."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self._group, self._device = group, device
        self._rank, self._ranks = dist.get_rank(group), dist.get_world_size(group)
        # Above the compute stream: a copy that may start should.
        self._stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        self._memory: list[Tensor] = []
        self._counters: list[Tensor] = []
        self._handle: object | None = None

    def reserve(self, size: int, counters: int) -> None:
        """One allocation on every GPU, mapped by all. Waits for all work on all GPUs."""
        import torch.distributed._symmetric_memory as symmetric_memory

        keep_multicast_off()
        self._meet()
        self._memory, self._counters, self._handle = [], [], None
        torch.cuda.empty_cache()  # the driver gives out only what torch's allocator doesn't hold
        size = (size + 255) // 256 * 256
        total = size + 4 * counters
        own = symmetric_memory.empty(total, dtype=torch.uint8, device=self._device)
        handle = symmetric_memory.rendezvous(own, self._group)
        own.zero_()
        self._handle = (own, handle)  # the mapping lives as long as these
        for rank in range(self._ranks):
            mapped = handle.get_buffer(rank, (total,), torch.uint8, 0)
            self._memory.append(mapped[:size])
            self._counters.append(mapped[size:].view(torch.int32))
        self._meet()  # nobody may signal before all are zeroed

    def memory(self, rank: int) -> Tensor:
        """A rank's bytes, as this GPU sees them."""
        return self._memory[rank]

    def fence(self) -> None:
        """The copying stream waits for the computing one."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def copy(self, into_NM: Tensor, source_NM: Tensor) -> None:
        """On the copying stream; the source's memory isn't given to others before it is done."""
        source_NM.record_stream(self._stream)
        cuda_driver.copy_rows(into_NM, source_NM, self._stream.cuda_stream)

    def signal(self, rank: int, counter: int, value: int) -> None:
        """On the copying stream, behind the copies."""
        address = self._counters[rank][counter].data_ptr()
        cuda_driver.write_word(address, value, self._stream.cuda_stream)

    def wait(self, counter: int, value: int) -> None:
        """Hold the computing stream. A rank that never sends is the watch's business (`watch.py`)."""
        address = self._counters[self._rank][counter].data_ptr()
        cuda_driver.wait_word(address, value, torch.cuda.current_stream(self._device).cuda_stream)

    def settled(self, seconds: float) -> bool:
        """Whether all that was queued ends in time. If not, the waits are let go: nothing may be trusted."""
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record(torch.cuda.current_stream(self._device))
        deadline = time.monotonic() + seconds
        while not done.query():  # type: ignore[no-untyped-call]
            if time.monotonic() > deadline:
                for counter in self._counters[self._rank]:
                    cuda_driver.write_word(counter.data_ptr(), 2**31 - 1, self._stream.cuda_stream)
                torch.cuda.synchronize(self._device)
                return False
            time.sleep(0.01)
        return True

    def close(self) -> None:
        """Unmap. All ranks must be done with it; after a failure the process ends anyway."""
        self._memory, self._counters, self._handle = [], [], None

    def _meet(self) -> None:
        torch.cuda.synchronize(self._device)
        dist.barrier(group=self._group)
        torch.cuda.synchronize(self._device)

"""A node's memory, as an operator sees it."""

import psutil

from jobs.nodes import GpuUse
from worker.vitals import Memory, total_memory


def test_gpus_are_summed() -> None:
    gpus = [GpuUse(index=n, busy=0.5, memory_used=60 + n, memory_total=80) for n in range(2)]
    assert total_memory(gpus, [psutil.Process()]) == Memory(121, 160)


def test_a_cpu_nodes_ranks() -> None:
    found = total_memory([], [psutil.Process(), psutil.Process()])
    assert found is not None
    assert 2 * 10 * 2**20 < found.used < found.total == psutil.virtual_memory().total
    gone = psutil.Popen(["true"])
    gone.wait()
    assert total_memory([], [gone]) is None

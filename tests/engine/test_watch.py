"""What counts as a hang: nobody gets on, on the host or on the GPU."""

import time
from collections import deque

import numpy as np
import pytest
import torch
import torch.distributed as dist

from engine.parallel import watch
from engine.parallel.watch import BEAT, BUSY, IDLE, PID, STATE, Watch


class Mark:
    """An event that the GPU has reached, or not, or that a failed kernel made useless."""

    def __init__(self, reached: bool | None) -> None:
        self.reached = reached

    def query(self) -> bool:
        if self.reached is None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return self.reached


@pytest.fixture
def one(world_of_one: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch) -> Watch:
    """A watch of one rank past its first video, whose thread looks no more; the limit is 10 s."""
    made = Watch(world_of_one, 10.0)
    made.close()
    made._generations = 1
    return made


def ranks(one: Watch, *ages: float) -> None:
    """So many busy ranks, whose last beats were so many seconds ago."""
    now = time.monotonic()
    one.ranks, one._board = len(ages), np.zeros((len(ages), 3))
    for rank, age in enumerate(ages):
        one._board[rank, [PID, BEAT, STATE]] = 100 + rank, now - age, BUSY


def test_a_rank_that_waits_for_anothers_long_work_does_not_hang(one: Watch) -> None:
    ranks(one, 40.0, 3.0, 25.0)
    assert not one._silent()  # rank 1 gets on: rank 0 waits for it
    ranks(one, 14.0, 12.0, 60.0)
    assert one._silent().startswith("rank 2 (process 102) did nothing for 60 s")
    one._board[2, STATE] = IDLE
    assert one._silent().startswith("rank 0 (process 100)")


def test_a_gpu_that_gets_on_beats_for_a_host_that_waits(one: Watch) -> None:
    ranks(one, 30.0)
    one._marks = deque([Mark(True), Mark(True), Mark(False)])  # type: ignore[list-item]
    one._count_marks()
    assert len(one._marks) == 1
    assert not one._silent()
    ranks(one, 30.0)
    one._count_marks()  # stuck
    assert "did nothing for 30 s" in one._silent()
    one._marks.appendleft(Mark(None))  # type: ignore[arg-type]
    one._count_marks()
    assert not one._marks
    assert "did nothing" in one._silent()


def test_a_cpu_is_where_its_thread_is(one: Watch) -> None:
    ranks(one, 30.0)
    one.pulse()
    assert not one._silent()
    assert one._device == torch.device("cpu")
    assert one.limit < watch.FIRST_SECONDS  # the first video compiles

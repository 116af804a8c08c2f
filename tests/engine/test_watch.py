"""What counts as a hang: nobody gets on, on the host or on the GPU."""

import time
from collections import deque

import numpy as np
import pytest
import torch
import torch.distributed as dist

from engine.errors import RankLost, RequestError
from engine.parallel import watch
from engine.parallel.watch import BEAT, BUSY, FAILED, FULL, IDLE, LEFT, PID, STATE, Watch


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


def test_the_first_video_may_be_silent_for_as_long_as_kernels_compile(one: Watch) -> None:
    one._generations = 0
    ranks(one, 60.0)
    assert not one._silent()
    ranks(one, watch.FIRST_SECONDS + 1)
    assert one._silent()
    ranks(one, 60.0)
    with one.working():
        pass
    ranks(one, 60.0)
    assert "did nothing for 60 s" in one._silent()


def work(one: Watch, error: BaseException) -> None:
    with one.working():
        raise error


@pytest.mark.parametrize(
    ("error", "state", "words"),
    [
        (KeyError("a mistake"), FAILED, "rank 0 failed in the midst of a video"),
        (torch.OutOfMemoryError("7 GiB"), FULL, "rank 0 ran out of memory in the midst of a video"),
    ],
)
def test_a_rank_that_gave_up_says_so_until_its_end_and_works_no_more(
    one: Watch, error: Exception, state: int, words: str
) -> None:
    """Closing must not make it one that left in order: the others would wait for it."""
    with pytest.raises(type(error)):
        work(one, error)
    one.close()
    assert one._board[0, STATE] == state
    assert one.lost == words
    with pytest.raises(RankLost, match=words):
        work(one, AssertionError("it worked"))


def test_what_all_ranks_refuse_leaves_them_whole(one: Watch) -> None:
    with pytest.raises(RequestError):
        work(one, RequestError("seed", 8, "others"))
    assert one._board[0, STATE] == IDLE
    assert not one.lost


def test_a_rank_that_left_in_order_is_not_lost(one: Watch) -> None:
    ranks(one, 0.0, 0.0, 0.0)
    one._processes = {7: 1, 8: 2}
    one._board[1, STATE] = LEFT
    assert not one._dead(7)
    assert one._dead(8) == "rank 2 (process 102) died"


def test_another_rank_that_gave_up_is_noticed(one: Watch) -> None:
    ranks(one, 0.0, 0.0)
    assert not one._gave_up()
    one._board[0, STATE] = FAILED
    assert not one._gave_up()  # this one's own error is raised by itself
    one._board[1, STATE] = FULL
    assert one._gave_up() == "rank 1 ran out of memory in the midst of a video"

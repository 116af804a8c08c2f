"""What the node makes of its ranks' reports, and how it notices a hang; no Ray cluster needed."""

import pytest
import torch

from engine.errors import OutOfMemory, RequestError
from jobs.job import FailureClass
from worker.group import GroupBroken, agree, explained
from worker.rank import failure_class
from worker.reports import RankReport


def test_all_done_is_rank_0s_report() -> None:
    reports = [RankReport(1, "done"), RankReport(0, "done", ended_at=5.0)]
    assert agree(reports).ended_at == 5.0


def test_a_stop_comes_with_rank_0s_reason() -> None:
    assert agree([RankReport(1, "stopped"), RankReport(0, "stopped", stop="cancel")]).stop == "cancel"


def test_a_refused_request_leaves_the_group_whole() -> None:
    refused = [RankReport(n, "failed", failure=FailureClass.USER, detail="size") for n in (0, 1)]
    assert agree(refused).failure is FailureClass.USER


@pytest.mark.parametrize(
    ("reports", "failure"),
    [
        ([RankReport(0, "done"), RankReport(1, "failed")], FailureClass.INFRASTRUCTURE),
        ([RankReport(0, "stopped"), RankReport(1, "done")], FailureClass.INFRASTRUCTURE),
        (
            [RankReport(n, "failed", failure=FailureClass.OUT_OF_MEMORY) for n in (0, 1)],
            FailureClass.OUT_OF_MEMORY,
        ),
        (
            [RankReport(0, "failed", failure=FailureClass.USER), RankReport(1, "done")],
            FailureClass.INFRASTRUCTURE,
        ),
        (
            [
                RankReport(0, "failed", detail="connection closed by peer"),
                RankReport(1, "failed", failure=FailureClass.OUT_OF_MEMORY, detail="out of memory"),
            ],
            FailureClass.OUT_OF_MEMORY,
        ),
    ],
)
def test_anything_else_breaks_the_group(reports: list[RankReport], failure: FailureClass) -> None:
    with pytest.raises(GroupBroken) as caught:
        agree(reports)
    assert caught.value.failure is failure


def test_a_rank_that_dies_of_waiting_for_a_failed_one_is_not_the_reason() -> None:
    death = GroupBroken(FailureClass.INFRASTRUCTURE, "a rank died: it waited for a lost rank")
    full = RankReport(1, "failed", failure=FailureClass.OUT_OF_MEMORY, detail="OutOfMemory: 7 GiB")
    other = RankReport(2, "failed", failure=FailureClass.INFRASTRUCTURE, detail="RankLost: rank 1")
    assert explained(death, [RankReport(3, "done")]) is death
    why = explained(death, [other, full])
    assert (why.failure, str(why)) == (FailureClass.OUT_OF_MEMORY, "OutOfMemory: 7 GiB")
    assert str(explained(death, [other])) == "RankLost: rank 1"
    killed = GroupBroken(FailureClass.OUT_OF_MEMORY, "a rank ran out of memory: by the machine's guard")
    assert explained(killed, [other]) is killed


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RequestError("size", "1*1", "64*48"), FailureClass.USER),
        (OutOfMemory("cuda:0"), FailureClass.OUT_OF_MEMORY),
        (torch.OutOfMemoryError("cuda:0"), FailureClass.OUT_OF_MEMORY),
        (MemoryError(), FailureClass.OUT_OF_MEMORY),
        (RuntimeError("NCCL"), FailureClass.INFRASTRUCTURE),
        (ValueError("a bug"), FailureClass.INFRASTRUCTURE),
    ],
)
def test_whose_fault_it_is(error: Exception, expected: FailureClass) -> None:
    assert failure_class(error) is expected

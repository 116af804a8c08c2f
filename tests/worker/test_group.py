"""What the node makes of its ranks' reports, and how it notices a hang; no Ray cluster needed."""

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine.errors import OutOfMemory, RequestError
from jobs.job import FailureClass
from worker import group as group_module
from worker.group import GroupBroken, RankGroup, agree, explained
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


class Ref:
    """What a rank's call will give, `seconds` after it was made."""

    def __init__(self, value: Any, seconds: float = 0.0) -> None:
        self.value, self.at = value, time.monotonic() + seconds


class FakeRay:
    """As much of Ray as `RankGroup.generate` needs."""

    exceptions = group_module.ray.exceptions

    def wait(self, refs: list[Ref], timeout: float) -> tuple[list[Ref], list[Ref]]:
        done = [ref for ref in refs if ref.at <= time.monotonic()]
        if not done:
            time.sleep(timeout)
        return done, [ref for ref in refs if ref not in done]

    def get(self, ref: Ref) -> Any:
        return ref.value


def fake_rank(index: int, seconds: float) -> SimpleNamespace:
    """A rank that has made its part after `seconds`."""
    made = RankReport(index, "done")
    return SimpleNamespace(
        generate=SimpleNamespace(remote=lambda *_: Ref(made, seconds)),
        silence=SimpleNamespace(remote=lambda: Ref(0.0)),
    )


@pytest.mark.parametrize(
    ("seconds", "whole"),
    [((0.0, 3600.0, 0.0), False), ((0.0, 0.2, 0.2), True), ((1.3, 0.0, 0.0), True)],
    ids=["a rank hangs", "ranks end later", "rank 0 decodes alone"],
)
def test_a_rank_that_hangs_when_rank_0_is_done_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, seconds: tuple[float, ...], whole: bool
) -> None:
    monkeypatch.setattr(group_module, "ray", FakeRay())
    monkeypatch.setattr(group_module, "WATCH_SECONDS", 0.05)
    plan: Any = SimpleNamespace(settings=SimpleNamespace(step_timeout_seconds=1.0))
    ranks: Any = None
    group = RankGroup(plan, ranks)
    group._ranks = [fake_rank(index, after) for index, after in enumerate(seconds)]
    group.leader = group._ranks[0]
    ended: list[object] = []

    def generate() -> None:
        job: Any = None
        try:
            ended.append(group.generate(job, job, job).outcome)
        except GroupBroken as broken:
            ended.append(str(broken))

    thread = threading.Thread(target=generate, daemon=True)
    thread.start()
    thread.join(5)
    assert ended == ["done"] if whole else "rank 1" in str(ended), ended


@pytest.mark.parametrize(
    ("first", "silence", "words"),
    [
        (Ref(RankReport(0, "failed", detail="NCCL says no")), 0.0, "NCCL says no"),
        (Ref(RankReport(0, "done"), 3600.0), 9999.0, "no step for 9999 s"),
    ],
    ids=["one failed", "rank 0 is silent"],
)
def test_ranks_that_hang_are_given_up(
    monkeypatch: pytest.MonkeyPatch, first: Ref, silence: float, words: str
) -> None:
    """After a failure the others have a few seconds; a rank 0 that makes no step stands for all."""
    monkeypatch.setattr(group_module, "ray", FakeRay())
    monkeypatch.setattr(group_module, "WATCH_SECONDS", 0.01)
    monkeypatch.setattr(group_module, "STRAGGLER_SECONDS", 0.1)
    plan: Any = SimpleNamespace(settings=SimpleNamespace(step_timeout_seconds=60.0))
    nothing: Any = None
    group = RankGroup(plan, nothing)
    group._ranks = [fake_rank(index, 3600.0) for index in range(2)]
    group.leader = group._ranks[0]
    group.leader.generate.remote = lambda *_: first
    group.leader.silence.remote = lambda: Ref(silence)
    ended: list[str] = []

    def generate() -> None:
        try:
            group.generate(nothing, nothing, nothing)
        except GroupBroken as broken:
            ended.append(str(broken))

    thread = threading.Thread(target=generate, daemon=True)
    thread.start()
    thread.join(5)
    assert words in str(ended)

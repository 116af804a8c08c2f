"""The node's supervisor: when it builds a cluster anew, how long it waits, and what it tells its host."""

import pickle
import signal
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.settings import Settings
from tests.support.clock import set_clock
from worker import supervisor as module
from worker.plan import NodePlan
from worker.supervisor import (
    BACKOFF_SECONDS,
    EXIT_DONE,
    EXIT_FATAL,
    EXIT_REBUILD,
    HEALTHY_SECONDS,
    Supervisor,
)


@pytest.fixture
def plan(tmp_path: Path) -> NodePlan:
    settings = Settings(data_dir=tmp_path, drain_seconds=40.0, spot_grace_seconds=7.0)
    return NodePlan(settings, tmp_path, None, "n1", 1, "cpu", 1, tmp_path / "run", tmp_path / "work")


class Rehearsed(Supervisor):
    """Its hosts end with these codes after so many seconds of a clock that only they move.

    What else runs below this process is the tests' own and stays: `swept` counts what would have been killed.
    """

    def __init__(self, plan: NodePlan, monkeypatch: pytest.MonkeyPatch, *ends: tuple[int, float]) -> None:
        super().__init__(plan)
        self.ends, self.now, self.waits, self.swept = list(ends), 0.0, list[float](), 0
        monkeypatch.setattr(module, "kill_descendants", self._sweep)
        set_clock(monkeypatch, module, monotonic=lambda: self.now)
        monkeypatch.setattr(self._wake, "wait", self.waits.append)

    def _sweep(self) -> None:
        self.swept += 1

    def _run_host(self) -> int:
        code, seconds = self.ends.pop(0)
        self.now += seconds
        return code


def test_a_broken_cluster_is_built_anew_ever_more_slowly_until_one_lived(
    plan: NodePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick, long = (EXIT_REBUILD, 1.0), (-signal.SIGKILL, HEALTHY_SECONDS + 1)
    ends = [*[quick] * (len(BACKOFF_SECONDS) + 1), long, quick, (EXIT_DONE, 1.0)]
    supervisor = Rehearsed(plan, monkeypatch, *ends)
    assert supervisor._supervise() == EXIT_DONE
    first, second, *_, last = BACKOFF_SECONDS
    assert supervisor.waits == [*BACKOFF_SECONDS, last, first, second]
    assert supervisor.swept == len(ends), "nothing of a cluster outlives its host"


def test_a_wrong_model_is_not_tried_again(plan: NodePlan, monkeypatch: pytest.MonkeyPatch) -> None:
    supervisor = Rehearsed(plan, monkeypatch, (EXIT_FATAL, 1.0), (EXIT_DONE, 1.0))
    assert supervisor._supervise() == EXIT_FATAL
    assert len(supervisor.ends) == 1


def test_a_cluster_that_breaks_while_it_drains_stays_down(
    plan: NodePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    supervisor = Rehearsed(plan, monkeypatch, (EXIT_DONE, 1.0))
    end = supervisor._run_host

    def breaks() -> int:
        supervisor._on_signal(signal.SIGTERM, None)
        end()
        return EXIT_REBUILD

    monkeypatch.setattr(supervisor, "_run_host", breaks)
    assert supervisor._supervise() == EXIT_DONE
    assert supervisor.waits == []


@pytest.mark.parametrize(
    ("numbers", "words", "grace"),
    [
        ([signal.SIGTERM], ["drain"], 40.0),
        ([signal.SIGTERM, signal.SIGTERM], ["drain", "stop"], 0.0),
        ([signal.SIGINT], ["stop"], 0.0),
        ([signal.SIGTERM, signal.SIGINT], ["drain", "stop"], 0.0),
    ],
)
def test_what_a_signal_asks_for(
    numbers: list[signal.Signals],
    words: list[str],
    grace: float,
    plan: NodePlan,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    supervisor, told = Supervisor(plan), list[str]()
    monkeypatch.setattr(supervisor, "_tell", told.append)
    before = time.monotonic()
    for number in numbers:
        supervisor._on_signal(number, None)
    assert told == words
    assert supervisor._deadline() - before - module.LAST_SECONDS == pytest.approx(grace, abs=5)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a shell script in the place of the program that hosts a cluster."""

    def be(script: str) -> None:
        program = tmp_path / "host"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr(module.sys, "executable", str(program))

    return be


@pytest.mark.parametrize("early", [True, False], ids=["before its start", "while it runs"])
def test_the_host_gets_the_plan_and_then_the_word(
    early: bool, plan: NodePlan, host: Callable[[str], None], tmp_path: Path
) -> None:
    """A signal may come at any moment: also one that comes before there is a host reaches it."""
    host(f"LC_ALL=C exec sed -u -n -e 'w {tmp_path}/got' -e '/reclaim$/q'")
    supervisor = Supervisor(plan)
    timer = threading.Timer(0.3, supervisor._ask, ["reclaim"])
    supervisor._ask("reclaim") if early else timer.start()
    assert supervisor._run_host() == EXIT_DONE
    timer.join() if not early else None
    got = (tmp_path / "got").read_bytes()
    assert pickle.loads(got) == plan
    assert got.endswith(b"reclaim\n")


def test_a_host_that_does_not_end_is_killed_after_its_grace(
    plan: NodePlan, host: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    host("trap '' TERM; exec cat >/dev/null")
    monkeypatch.setattr(module, "LAST_SECONDS", 0.1)
    supervisor = Supervisor(plan)
    supervisor._ask("stop")
    assert supervisor._run_host() == -signal.SIGKILL


def test_a_host_that_dies_before_it_has_read_its_plan_is_followed_by_another(
    plan: NodePlan, host: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as one that the kernel killed for memory: the node must outlive it."""
    host("exit 3")
    supervisor, dump = Supervisor(plan), pickle.dump

    def late(plan: NodePlan, pipe: Any) -> None:
        assert supervisor._host is not None
        supervisor._host.wait()
        dump(plan, pipe)

    monkeypatch.setattr(module.pickle, "dump", late)
    assert supervisor._run_host() == 3

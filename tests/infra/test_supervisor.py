"""The supervisor heals parts and leaves no process behind, however it ends."""

import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from infra.process import Part, PartSpec
from infra.supervisor import Supervisor
from tests.support.processes import marked

MARK = "REEL_TEST_MARK"


class Supervised:
    """A `tests.infra.supervised` process; everything below it carries a mark of this test's own."""

    def __init__(self, folder: Path, case: str) -> None:
        self.mark = f"{MARK}={secrets.token_hex(8)}"
        name, value = self.mark.split("=")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.infra.supervised", str(folder), case],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, name: value},
        )
        assert self.process.stdout is not None
        self.out = self.process.stdout

    def line(self, start: str) -> str:
        """The next line of its output that starts so."""
        for line in self.out:
            if line.startswith(start):
                return line.strip()
        raise AssertionError(
            f"it ended (exit code {self.process.wait()}) without a line that starts {start!r}"
        )

    def gone(self, seconds: float = 20.0) -> bool:
        """Whether every process with the mark ends within so many seconds."""
        return until(lambda: not marked(self.mark), seconds)


def until(done: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if done():
            return True
        time.sleep(0.05)
    return done()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str], Supervised]]:
    made: list[Supervised] = []

    def begin(case: str) -> Supervised:
        made.append(Supervised(tmp_path, case))
        return made[-1]

    yield begin
    for item in made:
        item.process.kill()
        item.out.close()
        item.process.wait()
        assert item.gone(), "something was left"


def test_a_killed_part_is_started_again(start: Callable[[str], Supervised]) -> None:
    supervised = start("family")
    pid = int(supervised.line("up ").split()[1])
    os.kill(pid, signal.SIGKILL)
    assert supervised.line("part-0 ended") == "part-0 ended (killed by SIGKILL): starting it again"
    assert int(supervised.line("part-0 started again").rstrip(")").split()[-1]) != pid


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_stops_everything(number: signal.Signals, start: Callable[[str], Supervised]) -> None:
    supervised = start("family")
    supervised.line("up ")
    assert len(marked(supervised.mark)) == 4  # the guard, the supervisor, child and grandchild
    supervised.process.send_signal(number)
    assert supervised.process.wait(20) == 0
    assert marked(supervised.mark) == []


def test_a_signal_during_the_start_stops_everything(start: Callable[[str], Supervised]) -> None:
    supervised = start("family")
    assert until(lambda: len(marked(supervised.mark)) > 1, 20)  # the supervisor is there
    supervised.process.terminate()
    assert supervised.process.wait(20) == 0
    assert marked(supervised.mark) == []


def test_a_part_that_ignores_sigterm_is_killed(start: Callable[[str], Supervised]) -> None:
    supervised = start("deaf")
    supervised.line("up ")
    began = time.monotonic()
    supervised.process.terminate()
    assert supervised.process.wait(20) == 0
    assert time.monotonic() - began < 10
    assert marked(supervised.mark) == []


@pytest.mark.parametrize("victims", ["guard", "supervisor", "both"])
def test_a_killed_supervisor_leaves_nothing(victims: str, start: Callable[[str], Supervised]) -> None:
    supervised = start("family")
    part = int(supervised.line("up ").split()[1])
    inner = psutil.Process(part).ppid()
    assert psutil.Process(inner).ppid() == supervised.process.pid
    # "both" can't be at the same moment; stopped, the first one has no time for its orderly stop
    os.kill(inner, signal.SIGSTOP) if victims == "both" else None
    if victims != "supervisor":
        supervised.process.kill()
    if victims != "guard":
        os.kill(inner, signal.SIGKILL)
    supervised.process.wait()
    if victims == "both":  # the grandchild's session is beyond reach then; the parts are not
        assert until(lambda: not psutil.pid_exists(part), 20)
        for pid in marked(supervised.mark):
            os.kill(pid, signal.SIGKILL)
    assert supervised.gone()


def test_a_part_that_cannot_start_ends_it_all_and_says_why(start: Callable[[str], Supervised]) -> None:
    supervised = start("wrong")
    line = supervised.line("error ")
    assert "part-1 ended (exit code 1)" in line
    assert supervised.out.read().strip() == "the model is missing"
    assert supervised.process.wait(20) == 1
    assert marked(supervised.mark) == []


def test_a_part_that_fails_once_in_the_start_gets_another_chance(start: Callable[[str], Supervised]) -> None:
    supervised = start("flaky")
    assert supervised.line("part-0 started again")
    assert supervised.line("up ")


def test_two_stacks_never_share_a_data_dir(start: Callable[[str], Supervised]) -> None:
    first = start("family")
    first.line("up ")
    second = start("family")
    line = second.out.read() or ""
    assert second.process.wait(30) == 1
    assert "is in use by another stack" in line
    assert f"(pid {first.process.pid})" in line


def test_a_stack_can_start_where_another_was_killed(start: Callable[[str], Supervised]) -> None:
    first = start("family")
    first.line("up ")
    first.process.kill()
    second = start("family")
    assert second.line("up ")
    assert marked(first.mark) == [], "it must not start before the first one's processes are gone"


def test_a_part_that_keeps_dying_waits_longer_each_time_until_one_lived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = Part(PartSpec("false", ("false",), os.environ, tmp_path / "log", tmp_path))

    def delay() -> float:
        part.start()
        assert until(lambda: part.died() is not None, 10)
        assert not part.restart_if_due()
        return part._next_start - time.monotonic()

    delays = [delay() for _ in range(7)]
    assert delays == pytest.approx([0.5, 1, 2, 4, 8, 10, 10], abs=0.4)
    monkeypatch.setattr("infra.process.STABLE_SECONDS", 0.0)
    assert delay() == pytest.approx(0.5, abs=0.4)
    assert part.deaths == 8


def test_parts_stop_in_order_and_a_second_signal_ends_the_wait(tmp_path: Path) -> None:
    """Those of one number together: what the first ones still need goes after them."""
    marks = tmp_path / "marks"
    waits = f"trap 'sleep 0.2; echo %s >> {marks}; exit' TERM; echo up; while :; do sleep 0.02; done"
    deaf = "trap '' TERM; echo up; exec sleep 600"
    supervisor = Supervisor(lambda text: None)
    for name, order, script in (("last", 2, waits), ("first", 0, waits), ("deaf", 1, deaf)):
        argv = ("sh", "-c", script.replace("%s", name))
        log = tmp_path / f"{name}.log"
        supervisor.add(PartSpec(name, argv, os.environ, log, tmp_path, order, stop_seconds=60))
    assert until(lambda: all("up" in part.log_tail() for part in supervisor.parts), 10)
    supervisor._on_signal(signal.SIGINT, None)
    threading.Timer(0.6, supervisor._on_signal, [signal.SIGINT, None]).start()
    began = time.monotonic()
    supervisor._stop_in_order()
    assert time.monotonic() - began < 20
    assert marks.read_text().split() == ["first", "last"]
    assert all(part.stopped() for part in supervisor.parts)


def test_importing_the_supervisor_changes_nothing() -> None:
    """Signals and the subreaper are set when it is entered, not before."""
    before = signal.getsignal(signal.SIGTERM)
    Supervisor(print)
    assert signal.getsignal(signal.SIGTERM) is before

"""Runs the parts of a local stack: starts, restarts with backoff, waits, and stops them in order."""

import contextlib
import signal
import time
from collections.abc import Callable, Iterable
from types import FrameType

from infra.errors import CliError, Interrupted
from infra.process import Part, PartSpec, describe_exit
from infra.reaper import SIGNALS, adopt_orphans, kill_descendants, reap_orphans

MAX_EARLY_DEATHS = 3  # of one part before the stack was ready: give up instead of retrying for ever


class Supervisor:
    """A context manager around all child processes: whatever ends the block, no process survives it.

    Single-threaded on purpose (see `infra.reaper.die_with_parent`): parts are looked after inside
    `pause`, which everything that waits must call.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.parts: list[Part] = []
        self.ready = False  # from then on a death is an incident to heal, not a failed start
        self._tell = say
        self._signals: list[int] = []
        self._previous: dict[int, object] = {}
        self._chores: list[Part] = []

    def __enter__(self) -> "Supervisor":
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._on_signal)
        adopt_orphans()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._stop_in_order()
        finally:
            if left := kill_descendants():
                self._say(f"killed {left} processes that had outlived their part")
            for number, handler in self._previous.items():
                signal.signal(number, handler)  # type: ignore[arg-type]

    def add(self, spec: PartSpec) -> Part:
        """Start a part and look after it from now on."""
        part = Part(spec)
        part.start()
        self.parts.append(part)
        return part

    def run_chore(self, spec: PartSpec, seconds: float) -> None:
        """Run a process to its end. Raises CliError with its log when it fails or takes longer."""
        part = Part(spec)
        self._chores.append(part)
        try:
            part.start()
            self.wait_for(part.stopped, seconds, spec.name, part)
            if status := part.died():
                raise CliError(f"{spec.name} failed ({describe_exit(status)}):\n{part.log_tail()}")
        finally:
            part.kill_group()
            self._chores.remove(part)

    def pause(self, seconds: float = 0.1) -> None:
        """Look after the parts for so long. Raises Interrupted when a signal has come."""
        deadline = time.monotonic() + seconds
        while True:
            self.check()
            self._heal()
            left = deadline - time.monotonic()
            if left <= 0:
                return
            time.sleep(min(0.1, left))  # a signal's handler runs at once, the sleep then goes on

    def wait_for(self, done: Callable[[], bool], seconds: float, what: str, part: Part | None = None) -> None:
        """Call `done` until it is true. Raises CliError with the part's log after `seconds`."""
        deadline = time.monotonic() + seconds
        while not done():
            if time.monotonic() > deadline:
                tail = f"; the end of {part.spec.log}:\n{part.log_tail()}" if part is not None else ""
                raise CliError(f"{what} not ready after {seconds:.0f} s{tail}")
            self.pause(0.2)

    def check(self) -> None:
        """Raise Interrupted if a signal asked to stop."""
        if self._signals:
            raise Interrupted(self._signals[0])

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self._signals.append(number)

    def _say(self, text: str) -> None:
        with contextlib.suppress(OSError):  # whoever read our output may be gone; the stack still has to stop
            self._tell(text)

    def _heal(self) -> None:
        for part in self.parts:
            status = part.died()
            if status is not None:
                self._after_death(part, status)
            elif part.restart_if_due():
                self._say(f"{part.spec.name} started again (pid {part.pid})")
        children = [part.pid for part in (*self.parts, *self._chores)]
        reap_orphans([pid for pid in children if pid is not None])

    def _after_death(self, part: Part, status: int) -> None:
        if not self.ready and (status == 1 or part.deaths >= MAX_EARLY_DEATHS):
            # our own parts exit with 1 after saying what is wrong: trying again would not help
            raise CliError(
                f"{part.spec.name} ended ({describe_exit(status)}); "
                f"the end of {part.spec.log}:\n{part.log_tail()}"
            )
        self._say(f"{part.spec.name} ended ({describe_exit(status)}): starting it again")

    def _stop_in_order(self) -> None:
        for order in sorted({part.spec.stop_order for part in self.parts}):
            self._stop([part for part in self.parts if part.spec.stop_order == order])

    def _stop(self, parts: Iterable[Part]) -> None:
        group = list(parts)
        signals_before = len(self._signals)
        start = time.monotonic()
        for part in group:
            part.terminate()
        waiting = group
        while waiting := [part for part in waiting if not part.stopped()]:
            again = len(self._signals) > max(1, signals_before)  # a second Ctrl-C: now
            if all(again or time.monotonic() - start > part.spec.stop_seconds for part in waiting):
                break
            time.sleep(0.02)
        for part in group:
            part.kill_group()

"""Leaving no process behind: parent-death signals, adoption of orphans, and a guard process around it all.

`reel up` is two processes. The outer one (the guard) only forwards signals and waits; the inner one
supervises the stack. Both adopt orphans, so that whatever loses its parent below them becomes their child,
also what has a session of its own or has overwritten its environment. If the inner one is killed, the guard
kills everything that it adopts; if the guard is killed, the inner one gets SIGTERM and stops in order. If
both are killed at once, each part gets SIGKILL as its parent's last will.
"""

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from types import FrameType

from infra.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_PR_SET_CHILD_SUBREAPER = 36
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def die_with_parent(parent: int, number: signal.Signals = signal.SIGKILL) -> Callable[[], None]:
    """A `preexec_fn` that has the kernel send the child a signal when `parent`'s forking thread ends (Linux).

    Call Popen from the main thread only: the signal is tied to the thread that forked, see prctl(2).
    """

    def arm() -> None:
        if _LIBC is not None:
            _LIBC.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
            if os.getppid() != parent:  # it died before the line above
                os._exit(1)

    return arm


def adopt_orphans() -> None:
    """Make this process the one that orphaned descendants are handed to, so that it can reap them (Linux)."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def reap_orphans(known: Collection[int]) -> None:
    """Collect ended children that were adopted; `known` are the pids that somebody else waits for."""
    for task in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for pid in map(int, task.read_text().split()):
                if pid not in known:
                    with contextlib.suppress(ChildProcessError):
                        os.waitpid(pid, os.WNOHANG)


def kill_descendants(seconds: float = 30.0) -> int:
    """SIGKILL everything below this process until nothing is left; how many there were.

    Repeats because a process that is being killed may just have started another, and because orphans arrive
    as their parents die.
    """
    import psutil

    killed: set[int] = set()
    deadline = time.monotonic() + seconds
    while left := psutil.Process().children(recursive=True):
        for process in left:
            with contextlib.suppress(psutil.Error):
                if process.status() != psutil.STATUS_ZOMBIE:
                    killed.add(process.pid)
                process.kill()
        reap_orphans(())
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    return len(killed)


def guard() -> None:
    """Fork, and return in the child alone; this process waits, kills what is left, exits as the child did.

    In the child SIGINT, SIGTERM and SIGHUP raise Interrupted until somebody handles them otherwise. Call it
    while the process has one thread.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    child = os.fork()
    if child == 0:
        os.setsid()  # a terminal's Ctrl-C reaches the guard, which forwards it once
        die_with_parent(parent, signal.SIGTERM)()
        _handle(_interrupt)
        return
    adopt_orphans()
    _handle(lambda number, frame: _send(child, number))
    status = _wait_for(child)
    kill_descendants()
    os._exit(os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status))


def _handle(handler: Callable[[int, FrameType | None], None]) -> None:
    for number in SIGNALS:
        signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _interrupt(number: int, _: FrameType | None) -> None:
    raise Interrupted(number)


def _send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _wait_for(child: int) -> int:
    """The child's wait status; collects adopted processes meanwhile."""
    while True:
        pid, status = os.waitpid(-1, 0)
        if pid == child:
            return status

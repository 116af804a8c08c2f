"""Leaving no process behind: parent-death signals, adoption of orphans, and a sweep by a marker.

Every process of a local stack carries ``REEL_STACK=<random id>`` in its environment, inherited by whatever
it starts (Ray's daemons and workers too). Four layers, because each has a hole: the orderly stop needs a
living supervisor; a parent-death signal reaches only direct children; a process group is left by any child
that starts its own session; the sweep needs somebody to run it. That somebody, when the supervisor itself
was killed, is the guardian (`infra/guardian.py`).
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path

MARKER = "REEL_STACK"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_PR_SET_CHILD_SUBREAPER = 36
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def die_with_parent(parent: int) -> Callable[[], None]:
    """A `preexec_fn` that has the kernel kill the child when `parent`'s spawning thread ends (Linux).

    Call Popen from the main thread only: the signal is tied to the thread that forked, see prctl(2).
    """

    def arm() -> None:
        if _LIBC is not None:
            _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != parent:  # it died before the line above
                os._exit(1)

    return arm


def adopt_orphans() -> None:
    """Make this process the one that orphaned descendants are handed to, so that it can reap them (Linux)."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def reap_orphans(known: Collection[int]) -> None:
    """Collect ended children that were adopted; `known` are the pids that a Popen object waits for."""
    for task in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for pid in map(int, task.read_text().split()):
                if pid not in known:
                    with contextlib.suppress(ChildProcessError):
                        os.waitpid(pid, os.WNOHANG)


def marked(marker: str) -> list[int]:
    """The pids of living processes, other than this one, whose environment carries `marker` (KEY=value)."""
    key, _, value = marker.partition("=")
    if not Path("/proc/self/environ").exists():
        import psutil

        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.pid != os.getpid() and process.environ().get(key) == value:
                    found.append(process.pid)
        return found
    wanted = marker.encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):  # ended meanwhile, or another user's
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


def sweep(marker: str, spare: Collection[int] = (), seconds: float = 10.0) -> list[int]:
    """SIGKILL every marked process except `spare` until none is left; returns the pids that were killed.

    Repeats because a process that is being killed may just have started another.
    """
    killed: set[int] = set()
    deadline = time.monotonic() + seconds
    while left := [pid for pid in marked(marker) if pid not in spare]:
        for pid in left:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        killed.update(left)
        reap_orphans(spare)
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    return sorted(killed)


class Guardian:
    """The process that sweeps when this one is killed; it notices by the end of a pipe.

    It also keeps the data dir's lock (`lock_fd`) until it is done, so that a new stack cannot start on a
    data dir whose old processes still die.
    """

    def __init__(self, marker: str, lock_fd: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "infra.guardian", marker],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            pass_fds=(lock_fd,),
        )

    def watch(self, pid: int) -> None:
        """Name a direct child, which it shall kill even if the child has overwritten its environment."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.write(f"{pid}\n".encode())
            self._process.stdin.flush()

    @property
    def pid(self) -> int:
        """Its process id, to be spared by the stack's own sweep."""
        return self._process.pid

    def dismiss(self) -> None:
        """Close the pipe and wait for it to end."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

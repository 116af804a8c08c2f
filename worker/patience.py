"""How the node bears what is away: tries that come again, reasons to stop, a rest after own failures."""

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from worker.drain import Drain
from worker.lease import Lease

FIRST_DELAY, LONGEST_DELAY = 0.5, 30.0  # seconds between tries of an upload or a download
# Seconds without a claim after an attempt that failed on this node's side.
FIRST_REST, LONGEST_REST = 1.0, 30.0


class Stopped(Exception):
    """The work is to be dropped: the lease's flags or the drain say why."""


def go_on(lease: Lease, drain: Drain) -> None:
    """Raise Stopped when the job was canceled or lost, or the drain's grace is over."""
    if lease.over or drain.overdue >= 0:
        raise Stopped


def pause(seconds: float, lease: Lease, drain: Drain) -> None:
    """Wait, but notice a reason to stop. Raises Stopped."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        go_on(lease, drain)
        time.sleep(0.1)


def delays() -> Iterator[float]:
    """Seconds to wait after each failed try, growing, and a little random so that nodes don't ask in step."""
    delay = FIRST_DELAY
    while True:
        yield delay * random.uniform(0.7, 1.0)
        delay = min(delay * 2, LONGEST_DELAY)


class Rest:
    """Keeps a node that fails by itself from claiming: it would take a whole queue to the dead letter.

    A failed attempt goes back to the front of its lane at once. A node whose disk is full, say, would take it
    again at once, until its attempts are used up, and so on with every job. Safe to share between threads.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a claim holds it, too
        self._next = FIRST_REST
        self._until = float("-inf")  # monotonic

    def failed(self) -> float:
        """An attempt failed on this node's side, outside the ranks; how many seconds nothing is claimed.

        Waits for the end of a claim under way: what the caller frees next is not for that one.
        """
        with self._lock:
            seconds, self._next = self._next, min(self._next * 2, LONGEST_REST)
            self._until = time.monotonic() + seconds
        return seconds

    def worked(self) -> None:
        """A video was published: whatever was wrong is over."""
        with self._lock:
            self._next, self._until = FIRST_REST, float("-inf")

    @contextmanager
    def claiming(self) -> Iterator[float]:
        """What is `left`. If that is 0 it stays so until the block, a claim, ends."""
        with self._lock:
            yield self.left

    @property
    def left(self) -> float:
        """Seconds until the next claim may be made; 0 when it may be now."""
        with self._lock:
            return max(self._until - time.monotonic(), 0.0)

"""Whether S3 answers: asked by one thread at a time, quickly, and remembered for a moment.

A handler that waits for S3 holds one of the server's threads. An S3 that accepts and never answers would soon
hold them all, and nothing could be submitted any more, which needs no S3.
"""

import time
from collections.abc import Callable
from threading import Lock

from api.checks import NotReadyError, check
from api.schemas import Check
from jobs.errors import StorageUnavailable

KEPT_SECONDS = 2.0


class StorageCheck:
    """Asks through a quick client's `ready`; `bucket` is for the text."""

    def __init__(self, ready: Callable[[], bool], bucket: str) -> None:
        self._ready, self._bucket = ready, bucket
        self._known: tuple[Check, float] | None = None  # and until when (monotonic) it counts
        self._asking = Lock()

    def look(self) -> Check:
        """The last answer while it counts, or while another thread asks; else a new one."""
        known = self._known
        if known is not None and time.monotonic() < known[1]:
            return known[0]
        if not self._asking.acquire(blocking=known is None):
            assert known is not None
            return known[0]
        try:
            if self._known is known:  # nobody asked while this one waited
                self._known = check(self._ask), time.monotonic() + KEPT_SECONDS
            assert self._known is not None
            return self._known[0]
        finally:
            self._asking.release()

    def demand(self) -> None:
        """Raise StorageUnavailable where it doesn't answer."""
        found = self.look()
        if not found.ok:
            raise StorageUnavailable(found.detail)

    def _ask(self) -> str:
        began = time.perf_counter()
        if not self._ready():
            raise NotReadyError(f"there is no bucket {self._bucket}; `reel up` makes it, or make it by hand")
        return f"answered in {(time.perf_counter() - began) * 1000:.0f} ms"

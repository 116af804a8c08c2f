"""Whether S3 answers: asked by one thread at a time, quickly, and remembered for a moment.

A handler that waits for S3 holds one of the server's threads. An S3 that accepts and never answers would soon
hold them all, and nothing could be submitted any more, which needs no S3.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock

from jobs.errors import StorageUnavailable

KEPT_SECONDS = 2.0


@dataclass(frozen=True)
class Look:
    """What was found, in words for `/readyz`, and until when (monotonic) it counts."""

    ok: bool
    detail: str
    until: float


class StorageCheck:
    """Asks through a quick client's `ready`; `bucket` is for the text."""

    def __init__(self, ready: Callable[[], bool], bucket: str) -> None:
        self._ready, self._bucket = ready, bucket
        self._known: Look | None = None
        self._asking = Lock()

    def look(self) -> Look:
        """The last answer while it counts, or while another thread asks; else a new one."""
        known = self._known
        if known is not None and time.monotonic() < known.until:
            return known
        if not self._asking.acquire(blocking=known is None):
            assert known is not None
            return known
        try:
            if self._known is known:  # nobody asked while this one waited
                self._known = self._ask()
            assert self._known is not None
            return self._known
        finally:
            self._asking.release()

    def demand(self) -> None:
        """Raise StorageUnavailable where it doesn't answer."""
        look = self.look()
        if not look.ok:
            raise StorageUnavailable(look.detail)

    def _ask(self) -> Look:
        began = time.perf_counter()
        try:
            ok = self._ready()
            detail = f"answered in {(time.perf_counter() - began) * 1000:.0f} ms"
            if not ok:
                detail = f"there is no bucket {self._bucket}; `reel up` makes it, or make it by hand"
        except (
            Exception
        ) as error:  # whatever a client library raises: the type tells enough, the text may not
            ok, detail = False, f"no answer ({type(error).__name__})"
        return Look(ok, detail, time.monotonic() + KEPT_SECONDS)

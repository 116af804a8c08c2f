"""Keeping a job's lease while something other than the ranks works on it, and saying how it ended."""

import logging
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TypeVar

from jobs.errors import IllegalTransition, JobNotFound, LeaseLost, StoreUnavailable
from jobs.job import Job, Phase
from jobs.store import JobStore

BEAT_SECONDS = 1.0
TELL_SECONDS = 60.0  # how long an unreachable Redis is tried to be told; then the lease's end tells it
T = TypeVar("T")
log = logging.getLogger(__name__)


class Lease:
    """A context that renews one job's lease from a thread. Look at `lost` and `canceled` between steps."""

    def __init__(self, store: JobStore, job: Job, phase: Phase, progress: float) -> None:
        self.lost = False  # another owner has the job, or it has ended: drop the work
        self.canceled = False
        self._store, self._job, self._phase, self._progress = store, job, phase, progress
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lease", daemon=True)

    def __enter__(self) -> "Lease":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    @property
    def over(self) -> bool:
        """Whether the work is to stop."""
        return self.lost or self.canceled

    def _run(self) -> None:
        while not self._ended.is_set():
            try:
                self.canceled = self._store.heartbeat(
                    self._job.id,
                    self._job.token,
                    phase=self._phase,
                    step=self._job.step,
                    progress=self._progress,
                    eta_seconds=None,
                )
            except LeaseLost as lost:
                log.warning("%s", lost)
                self.lost = True
                return
            except StoreUnavailable as error:
                log.warning("job %s: no heartbeat: %s", self._job.id, error)
            self._ended.wait(BEAT_SECONDS)


def tell(call: Callable[[], T], seconds: float = TELL_SECONDS) -> T | None:
    """Make one of the store's owner calls, again and again while Redis is away.

    None: the job is no longer ours (or Redis stayed away for `seconds`, after which its lease has run out).
    Every script tolerates a repeat, so a lost reply does no harm.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            return call()
        except (LeaseLost, IllegalTransition, JobNotFound) as gone:
            log.warning("%s", gone)
            return None
        except StoreUnavailable as error:
            if time.monotonic() > deadline:
                log.error("gave up telling the store: %s", error)
                return None
            time.sleep(0.5)

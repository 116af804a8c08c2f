"""Rank 0's line to Redis while the ranks compute: renews the lease, reports progress, reads the cancel flag.

A thread of its own, so that no GPU call delays a renewal; the engine only ever touches memory.
"""

import logging
import threading
import time
from types import TracebackType

from engine.config import GenerationRequest, Progress
from jobs.errors import LeaseLost, StoreUnavailable
from jobs.job import Job
from jobs.store import JobStore
from worker.estimate import Estimate, History
from worker.reports import Stop

BEAT_SECONDS = 0.5
log = logging.getLogger(__name__)


class Reporter:
    """A context around one generation; hand `on_progress` and `should_cancel` to the engine."""

    def __init__(self, store: JobStore, job: Job, request: GenerationRequest, history: History) -> None:
        self.estimate = Estimate(request, history)
        self.stop: Stop | None = None  # why the engine is to stop at the next step boundary
        self._store = store
        self._job = job
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reporter", daemon=True)

    def __enter__(self) -> "Reporter":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the thread; the lease is the publisher's to renew from here on."""
        self.estimate.close()
        self._ended.set()
        self._thread.join()

    def on_progress(self, progress: Progress) -> None:
        """The engine's progress callback."""
        self.estimate.update(progress)

    def should_cancel(self) -> bool:
        """The engine's cancel check, asked at each step boundary."""
        return self.stop is not None

    @property
    def silence(self) -> float:
        """Seconds since the engine last said anything: what a hung collective looks like from outside."""
        return time.monotonic() - self.estimate.changed_at

    def _run(self) -> None:
        while not self._ended.is_set():
            try:
                self._beat()
            except LeaseLost as lost:
                log.warning("%s", lost)
                self.stop = "lease_lost"
                return
            except StoreUnavailable as error:
                # The work goes on: if Redis comes back in time the lease still holds, else the token decides.
                log.warning("job %s: no heartbeat: %s", self._job.id, error)
            self._ended.wait(BEAT_SECONDS)

    def _beat(self) -> None:
        now = self.estimate
        canceled = self._store.heartbeat(
            self._job.id,
            self._job.token,
            phase=now.phase,
            step=now.step,
            progress=now.progress,
            eta_seconds=now.eta,
        )
        if canceled and self.stop is None:
            self.stop = "cancel"

"""One rank: a GPU, or a share of the CPU, with the pipeline warm. Rank 0 also reports and writes the MP4."""

import logging
import os
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from engine.config import Canceled, GenerationRequest
from engine.errors import OutOfMemory, RequestError
from jobs.client import connect
from jobs.job import FailureClass, Job
from jobs.store import JobStore
from worker.build import builder
from worker.estimate import History
from worker.manifest import manifest_of
from worker.plan import NodePlan
from worker.reporter import Reporter
from worker.reports import Loaded, RankReport, Stop
from worker.video import VideoFolder

log = logging.getLogger(__name__)


@dataclass
class _Written:
    """A video whose frames are all in ffmpeg's pipe."""

    sink: VideoFolder
    seconds: dict[str, float] = field(default_factory=dict)
    manifest: dict[str, object] = field(default_factory=dict)


class Rank:
    """What a rank actor is made of. `stop`, `silence` and `finish_video` come while `generate` runs."""

    def __init__(self, plan: NodePlan, index: int) -> None:
        self.plan = plan
        self.index = index
        self._history = History()
        self._reporter: Reporter | None = None
        self._written: dict[Path, _Written] = {}

    def load(self, rendezvous: Path) -> Loaded:
        """Join the other ranks through the `rendezvous` file and load the model. Raises BadModel."""
        began = time.monotonic()
        self._pipeline = builder(self.plan.settings.engine)(self.plan, self.index, rendezvous)
        if self.index == 0:
            self._store = JobStore(connect(self.plan.settings), self.plan.settings)
        log.info("rank %d ready in %.1f s on %s", self.index, time.monotonic() - began, self.plan.device)
        return Loaded(self._pipeline.spec, os.getpid())

    def generate(self, job: Job, request: GenerationRequest, folder: Path) -> RankReport:
        """Compute this rank's part of a video; never raises for what the engine or the request did wrong."""
        began = time.monotonic()
        try:
            if self.index == 0:
                self._lead(job, request, folder)
            else:
                self._pipeline.generate(request, NoFrames())
            report = RankReport(self.index, "done")
        except Canceled:
            report = RankReport(self.index, "stopped", stop=self._reporter.stop if self._reporter else None)
        except Exception as error:
            words = f"{type(error).__name__}: {error}"
            log.warning("job %s: rank %d: %s", job.id, self.index, words)
            report = RankReport(self.index, "failed", failure=failure_class(error), detail=words)
        self._reporter = None
        return replace(report, began_at=began, ended_at=time.monotonic())

    def stop(self, why: Stop) -> None:
        """Have the engine stop at its next step boundary, on all ranks."""
        reporter = self._reporter
        if reporter is not None and reporter.stop is None:
            reporter.stop = why

    def silence(self) -> float:
        """Seconds since the engine last made a step; 0 when nothing runs."""
        reporter = self._reporter
        return reporter.silence if reporter is not None else 0.0

    def finish_video(self, folder: Path) -> None:
        """Wait until a generated video's MP4 is whole on disk; the ranks may be at the next one already."""
        written = self._written.pop(folder)
        written.sink.finish(written.seconds, written.manifest)

    def _lead(self, job: Job, request: GenerationRequest, folder: Path) -> None:
        """Rank 0's way through `generate`: report, and feed the frames to the MP4."""
        sink = VideoFolder(folder, job.id, self._pipeline.spec.fps)
        try:
            with Reporter(self._store, job, request, self._history) as self._reporter:
                result = self._pipeline.generate(
                    request,
                    sink,
                    on_progress=self._reporter.on_progress,
                    should_cancel=self._reporter.should_cancel,
                )
        except BaseException:
            sink.abort()
            raise
        pipeline = self._pipeline
        manifest = manifest_of(job, pipeline.spec, pipeline.mesh, self.plan, result.seconds, result.work)
        self._written[folder] = _Written(sink, result.seconds, manifest)


class NoFrames:
    """The sink of the ranks that get no frames."""

    def write(self, frames: object) -> None:
        """Refuse: only rank 0 may be given frames."""
        raise AssertionError("a rank other than 0 was given frames")


def failure_class(error: BaseException) -> FailureClass:
    """Whose fault an exception of the engine is."""
    if isinstance(error, RequestError):
        return FailureClass.USER
    torch = sys.modules.get("torch")  # not imported for its error's sake: only a loaded one can raise it
    memory = (OutOfMemory, MemoryError) + ((torch.OutOfMemoryError,) if torch else ())
    if isinstance(error, memory):
        return FailureClass.OUT_OF_MEMORY
    return FailureClass.INFRASTRUCTURE

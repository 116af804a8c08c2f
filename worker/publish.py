"""From finished frames to a committed job: close the MP4, upload, finish. The GPUs go on meanwhile."""

import json
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from jobs.errors import JobNotFound, LeaseLost, StorageUnavailable, StoreUnavailable
from jobs.job import FailureClass, Job, JobError, Phase, VideoResult
from jobs.storage import ObjectStore, artifact_key
from jobs.store import JobStore
from jobs.timings import Timings
from worker.drain import Drain
from worker.estimate import PUBLISHING_PROGRESS
from worker.lease import Lease, tell
from worker.patience import Rest, Stopped, delays, go_on, pause
from worker.presets import made
from worker.spent import spent
from worker.spool import Spool
from worker.video import POSTER, VIDEO, VideoFacts, read_facts

MANIFEST = "manifest.json"
CONTENT_TYPES = {VIDEO: "video/mp4", POSTER: "image/jpeg", MANIFEST: "application/json"}
STORAGE_ERRORS = (StorageUnavailable, OSError)  # OSError: no such bucket, for one
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Finished:
    """A job whose frames are all made.

    close: waits for the MP4 to be whole; raises when its writer died. None: it is whole.
    """

    job: Job
    folder: Path
    close: Callable[[], None] | None = None


class Publisher:
    """Publishes one job at a time, from a thread of its own."""

    def __init__(self, store: JobStore, storage: ObjectStore, spool: Spool, drain: Drain) -> None:
        self._store, self._storage, self._spool, self._drain = store, storage, spool, drain
        self._free = threading.Semaphore(1)
        self._timings = Timings(store.redis)
        self.rest = Rest()  # the claim loop keeps it
        self.job: Job | None = None  # being published
        self.step_seconds: float | None = None  # one denoising step of the last published video

    def take(self, finished: Finished) -> None:
        """Hand over a finished job. Blocks, keeping its lease, while an earlier one is on its way."""
        if not self._free.acquire(blocking=False):
            with Lease(self._store, finished.job, Phase.PUBLISHING, PUBLISHING_PROGRESS):
                self._free.acquire()
        self.job = finished.job
        threading.Thread(target=self._run, args=(finished,), name="publisher", daemon=True).start()

    def wait(self) -> None:
        """Block until nothing is being published."""
        with self._free:
            return

    def _run(self, finished: Finished) -> None:
        try:
            self._publish(finished)
        except Exception:
            log.exception("job %s: publishing failed", finished.job.id)
            self._give_up(finished, "publishing failed; the node's log has the reason")
        finally:
            self.job = None
            self._free.release()

    def _publish(self, finished: Finished) -> None:
        job, store = finished.job, self._store
        with Lease(store, job, Phase.PUBLISHING, PUBLISHING_PROGRESS) as lease:
            try:
                facts = self._facts(finished)
                if facts is None:
                    if self._drain.overdue >= 0:  # it ended the rank that wrote the video
                        self._spool.discard(finished.folder)
                        raise Stopped
                    self._give_up(finished, "the rank that wrote the video died")
                    return
                result = self._upload(job, finished.folder, facts, lease)
                self._commit(job, result, lease)
            except (Stopped, LeaseLost):
                self._withdraw(job, lease)
                return
        self._spool.drop(job.id)
        self.rest.worked()
        log.info("job %s: published %d bytes", job.id, facts.bytes)

    def _facts(self, finished: Finished) -> VideoFacts | None:
        """Wait for the MP4 to be whole; None when it never will be."""
        try:
            if finished.close is not None:
                finished.close()
        except Exception as error:
            log.warning("job %s: the video was not finished: %s", finished.job.id, error)
        return read_facts(finished.folder)

    def _upload(self, job: Job, folder: Path, facts: VideoFacts, lease: Lease) -> VideoResult:
        """Put the three objects under the attempt's own prefix, however long S3 is away. Raises Stopped."""
        manifest = facts.manifest | {"video": {"sha256": facts.sha256, "bytes": facts.bytes}}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False), encoding="utf-8")
        keys = {name: artifact_key(job.id, job.token, name) for name in CONTENT_TYPES}
        began = time.monotonic()
        for name, content_type in CONTENT_TYPES.items():
            self._put(job, keys[name], folder / name, content_type, lease)
        upload = {Phase.PUBLISHING.value: round(time.monotonic() - began, 4)}
        return VideoResult(
            video_key=keys[VIDEO],
            poster_key=keys[POSTER],
            manifest_key=keys[MANIFEST],
            width=facts.width,
            height=facts.height,
            frames=facts.frames,
            fps=facts.fps,
            bytes=facts.bytes,
            sha256=facts.sha256,
            seconds=facts.seconds | upload,
            **spent(facts, self._store.settings.node_price_per_hour),
            **made(facts),
        )

    def _put(self, job: Job, key: str, path: Path, content_type: str, lease: Lease) -> None:
        for delay in delays():
            if not path.exists():
                raise FileNotFoundError(f"{path} is gone from the spool")
            go_on(lease, self._drain)
            try:
                self._storage.put_file(key, path, content_type)
                return
            except STORAGE_ERRORS as error:
                log.warning(
                    "job %s: upload of %s failed, again in %.1f s: %s", job.id, path.name, delay, error
                )
            pause(delay, lease, self._drain)

    def _commit(self, job: Job, result: VideoResult, lease: Lease) -> None:
        """The one write that makes the result the job's. Raises LeaseLost or Stopped."""
        while True:
            go_on(lease, self._drain)
            try:
                self._store.finish(job.id, job.token, result)
                self._learn(job, result)
                return
            except StoreUnavailable as error:
                log.warning("job %s: cannot commit yet: %s", job.id, error)
            pause(1.0, lease, self._drain)

    def _learn(self, job: Job, result: VideoResult) -> None:
        """Let estimates know what this video took."""
        self._timings.learn(job.request, result.seconds)
        if denoising := result.seconds.get("denoising"):
            self.step_seconds = denoising / job.request.sampling_steps

    def _withdraw(self, job: Job, lease: Lease) -> None:
        """Leave nothing of ours behind: canceled, given back (draining), or a stale owner."""
        if lease.canceled:
            tell(lambda: self._store.cancel_running(job.id, job.token))
            self._spool.drop(job.id)
        elif self._drain.overdue >= 0 and not lease.lost:
            tell(lambda: self._store.give_back(job.id, job.token))  # the finished MP4 stays in the spool
        # From here on a late commit of ours would be refused, so what is there now stays true.
        try:
            if self._committed(job):
                log.info("job %s: was committed, though the reply was lost", job.id)
                self._spool.drop(job.id)
                return
            self._storage.delete_prefix(artifact_key(job.id, job.token, ""))
        except (*STORAGE_ERRORS, StoreUnavailable) as error:  # they go with the job, at the latest
            log.warning("job %s: cannot remove objects of token %d: %s", job.id, job.token, error)

    def _committed(self, job: Job) -> bool:
        """Whether the job's result is this attempt's. Raises StoreUnavailable: nothing may be removed."""
        try:
            result = self._store.get(job.id).result
        except JobNotFound:
            return False
        return result is not None and result.video_key == artifact_key(job.id, job.token, VIDEO)

    def _give_up(self, finished: Finished, detail: str) -> None:
        """What is in the folder is of no use: the next attempt makes the video anew."""
        job = finished.job
        self._spool.discard(finished.folder)  # first: who claims the job next may be this node
        self.rest.failed()
        error = JobError(
            type="infrastructure",
            title="The video was made but could not be published",
            detail=detail,
            failure_class=FailureClass.INFRASTRUCTURE,
        )
        tell(lambda: self._store.fail(job.id, job.token, error))

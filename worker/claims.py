"""The claim loop: take a job, have the ranks make its frames, hand them to the publisher, take the next."""

import logging
import time
from pathlib import Path

import ray

from engine.config import GenerationRequest
from jobs.errors import StorageUnavailable, StoreUnavailable
from jobs.job import FailureClass, Job, JobError, Phase
from jobs.storage import ObjectStore
from jobs.store import JobStore
from worker.drain import Drain
from worker.group import GroupBroken, RankGroup
from worker.lease import Lease, tell
from worker.patience import Stopped, delays, go_on, pause
from worker.publish import Finished, Publisher
from worker.reports import RankReport
from worker.requests import engine_request
from worker.spool import Spool

START_ATTEMPTS = 3  # of a fresh group of ranks, before the whole cluster is rebuilt
TITLES = {
    FailureClass.USER: ("invalid-request", "The model can't do what the request asks"),
    FailureClass.OUT_OF_MEMORY: ("out-of-memory", "The GPUs ran out of memory"),
    FailureClass.INFRASTRUCTURE: ("infrastructure", "The attempt failed on our side"),
    FailureClass.LOST: ("lost", "The node was lost"),
}
log = logging.getLogger(__name__)


class ClaimLoop:
    """One thread's work. `run` returns when the node has drained."""

    def __init__(
        self,
        model: str,
        node_id: str,
        store: JobStore,
        storage: ObjectStore,
        group: RankGroup,
        publisher: Publisher,
        spool: Spool,
        drain: Drain,
    ) -> None:
        self.model, self.node_id = model, node_id
        self.store, self.storage = store, storage
        self.group, self.publisher, self.spool, self.drain = group, publisher, spool, drain
        self.job: Job | None = None  # on the ranks
        self._last_end: float | None = (
            None  # monotonic, of the previous job's GPU work; None: the ranks were idle
        )

    def run(self) -> None:
        """Serve until drained. Raises GroupBroken when the ranks don't come up any more."""
        while not self.drain.asked:
            self.job = self.claim()
            if self.job is not None:
                self.work(self.job)
                self.job = None
        self.publisher.wait()

    def claim(self) -> Job | None:
        """The next job, or None after a short sleep that a submission interrupts (unless the node rests)."""
        seconds = self.store.settings.poll_seconds
        try:
            with self.publisher.rest.claiming() as rest:
                job = None if rest else self.store.claim(self.model, self.node_id)
            if job is not None:
                return job
            self._last_end = None
            if rest:
                time.sleep(min(rest, seconds))
            else:
                self.store.wait_wake(self.model, seconds)
        except StoreUnavailable as error:
            log.warning("cannot claim: %s", error)
            time.sleep(seconds)
        return None

    def work(self, job: Job) -> None:
        """One attempt, from its claim until the publisher has it or the store knows why not."""
        log.info("job %s: claimed, token %d, attempt %d", job.id, job.token, job.attempts + 1)
        finished = self.spool.finished(job.id)
        if finished is not None:
            log.info("job %s: its video is already here, from an earlier attempt", job.id)
            self.publisher.take(Finished(job, finished))
            return
        try:
            folder = self.spool.folder(job)
            request = self.prepare(job, folder)
            if request is None:
                return
            report = self.group.generate(job, request, folder)
        except GroupBroken as broken:
            self.lost_ranks(job, broken)
        except ValueError as error:
            self.refuse(job, error)
        except OSError as error:
            self.ail(job, error)
        else:
            self.settle(job, report, folder)

    def prepare(self, job: Job, folder: Path) -> GenerationRequest | None:
        """The engine's request. None: it isn't to be made here, and the store knows.

        While S3 is away or slow the job's lease is kept: its attempts are for what it does to ranks. Raises
        ValueError for a request that no engine takes, OSError when the image can't be written.
        """
        if job.request.image is None:
            return engine_request(job, folder, self.storage)
        with Lease(self.store, job, Phase.ENCODING, 0.0) as lease:
            try:
                for delay in delays():
                    go_on(lease, self.drain)
                    try:
                        request = engine_request(job, folder, self.storage)
                        go_on(lease, self.drain)
                        return request
                    except StorageUnavailable as error:
                        log.warning("job %s: no image yet, again in %.1f s: %s", job.id, delay, error)
                    except FileNotFoundError as error:
                        self.refuse(job, error)
                        return None
                    pause(delay, lease, self.drain)
            except Stopped:
                self.withdraw(job, lease)
        return None

    def withdraw(self, job: Job, lease: Lease) -> None:
        """Let go of a job that the ranks haven't seen: canceled, given back (draining), or another's."""
        self.spool.discard(self.spool.attempt(job))
        if lease.canceled:
            tell(lambda: self.store.cancel_running(job.id, job.token))
        elif not lease.lost:
            tell(lambda: self.store.give_back(job.id, job.token))
        log.info("job %s: stopped before the ranks had it", job.id)

    def refuse(self, job: Job, error: Exception) -> None:
        """The attempt failed by the request's own fault."""
        self.spool.discard(self.spool.attempt(job))
        self.fail(job, FailureClass.USER, f"the request's image or size can't be used: {error}")

    def ail(self, job: Job, error: Exception) -> None:
        """The attempt failed by this node's fault, such as a full disk: the next job would fare no better."""
        self.spool.discard(self.spool.attempt(job))
        seconds = self.publisher.rest.failed()
        log.error("job %s: %s; nothing is claimed for %.0f s", job.id, error, seconds)
        self.fail(job, FailureClass.INFRASTRUCTURE, str(error))

    def settle(self, job: Job, report: RankReport, folder: Path) -> None:
        """What follows from a report that all ranks agree on."""
        if report.outcome == "done":
            self.log_gap(job, report)
            leader = self.group.leader
            self.publisher.take(Finished(job, folder, lambda: ray.get(leader.finish_video.remote(folder))))
            return
        self.spool.drop(job.id)
        if report.outcome == "failed":
            self.fail(job, report.failure, report.detail)
        elif report.stop == "cancel":
            tell(lambda: self.store.cancel_running(job.id, job.token))
        elif report.stop == "drain":
            tell(lambda: self.store.give_back(job.id, job.token))
        log.info("job %s: %s", job.id, report.stop or report.outcome)

    def lost_ranks(self, job: Job, broken: GroupBroken) -> None:
        """Free the job for its next attempt first, then make the ranks anew."""
        log.warning("job %s: %s", job.id, broken)
        if self.drain.overdue >= 0:
            tell(lambda: self.store.give_back(job.id, job.token))
        else:
            self.fail(job, broken.failure, str(broken))
        self.job = None
        self.group.end()
        self.spool.drop(job.id)
        self.start_group()

    def start_group(self) -> None:
        """Start the ranks, a few times if need be. Raises GroupBroken when they won't come up."""
        for attempt in range(1, START_ATTEMPTS + 1):
            if self.drain.asked:
                return
            try:
                began = time.monotonic()
                self.group.start()
                log.info("ranks are back after %.1f s", time.monotonic() - began)
                return
            except GroupBroken as broken:
                self.group.end()
                log.warning("ranks did not start (try %d of %d): %s", attempt, START_ATTEMPTS, broken)
                if attempt == START_ATTEMPTS:
                    raise

    def fail(self, job: Job, failure: FailureClass, detail: str) -> None:
        """Tell the store that the attempt failed; it decides whether there is another."""
        slug, title = TITLES[failure]
        error = JobError(type=slug, title=title, detail=detail, failure_class=failure)
        tell(lambda: self.store.fail(job.id, job.token, error))

    def log_gap(self, job: Job, report: RankReport) -> None:
        """Say how long the ranks had nothing to do between two jobs of a full queue."""
        if self._last_end is not None:
            log.info("job %s: ranks idle for %.4f s before it", job.id, report.began_at - self._last_end)
        self._last_end = report.ended_at

"""What has to happen though nobody asks: lost leases, deadlines, retention, and files without an owner."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from jobs.storage import ObjectStore
from jobs.store import JobStore
from jobs.sweep import garbage_later
from jobs.uploads import UploadIndex

BATCH = 100
ROUNDS = 50  # of one batch each, at most, in one call: the next call goes on
REMOVE_SECONDS = 30.0  # for files, in one call: under the time between two
log = logging.getLogger(__name__)


def sweep(store: JobStore) -> int:
    """Requeue or fail jobs whose lease ran out, expire late ones, purge old ones; how many changed."""
    changed = 0
    for _ in range(ROUNDS):
        report = store.sweep(BATCH)
        changed += report.total
        if report.requeued or report.failed:
            log.warning("leases lost: %s queued again, %s failed", report.requeued, report.failed)
        if report.total < BATCH:
            break
    return changed


def remove_files(store: JobStore, storage: ObjectStore, uploads: UploadIndex) -> int:
    """Remove from S3 what deleted and purged jobs left, and expired uploads. Returns how many prefixes went.

    The record of what is left lives in Redis until S3 has confirmed: a crash or an outage only delays it.
    What S3 refuses is put off, so that it stops nothing else. Images have half of REMOVE_SECONDS at most.
    """
    began = time.monotonic()
    jobs = Removal(
        due=store.garbage,
        remove=lambda job_id: storage.delete_prefix(f"jobs/{job_id}/"),
        done=store.garbage_done,
        later=lambda job_id: garbage_later(store.redis, job_id),
    )
    images = Removal(uploads.due, storage.delete, uploads.done, uploads.later)
    removed = images.run(began + REMOVE_SECONDS / 2)
    return removed + jobs.run(began + REMOVE_SECONDS)


@dataclass(frozen=True)
class Removal:
    """One kind of things to remove: what is due, how it goes, and what to write down afterwards."""

    due: Callable[[int], list[str]]
    remove: Callable[[str], object]
    done: Callable[[str], None]
    later: Callable[[str], None]

    def run(self, end: float) -> int:
        """Remove what is due until nothing is, or until `end` (monotonic); how many went."""
        removed, failed = 0, set[str]()
        while batch := [name for name in self.due(BATCH) if name not in failed]:
            for name in batch:
                if time.monotonic() >= end:
                    return removed
                try:
                    self.remove(name)
                except Exception as error:  # of this one: the others have their turn
                    if not failed:  # one line a call, however many there are
                        log.warning("%s: its files can't be removed now: %s", name, error)
                    failed.add(name)
                    self.later(name)
                else:
                    self.done(name)
                    removed += 1
        return removed

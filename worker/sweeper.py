"""What has to happen though nobody asks: lost leases, deadlines, retention, and files without an owner."""

import logging

from jobs.errors import StorageUnavailable
from jobs.storage import ObjectStore
from jobs.store import JobStore
from jobs.uploads import UploadIndex

BATCH = 100
ROUNDS = 50  # of one batch each, at most, in one call: the next call goes on
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
    """
    removed = 0
    try:
        for job_id in store.garbage(BATCH):
            storage.delete_prefix(f"jobs/{job_id}/")
            store.garbage_done(job_id)
            removed += 1
        for key in uploads.due(BATCH):
            storage.delete(key)
            uploads.done(key)
            removed += 1
    except (StorageUnavailable, OSError) as error:
        log.warning("files can't be removed now: %s", error)
    return removed

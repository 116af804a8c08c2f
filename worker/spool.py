"""The node's local videos: those being written, and finished ones that wait to be committed.

`<work_dir>/<job id>/<token>/` holds one attempt. A folder with facts.json is whole: as long as it is there,
the video is not made again, whatever happened to the attempt's lease, the cluster or S3 meanwhile.
"""

import contextlib
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from jobs.job import Job
from worker.video import FACTS, read_facts

KEEP_SECONDS = 86_400.0  # a finished video that nobody committed by then is dropped


class Spool:
    """Folders of attempts below one node's work directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)

    def attempt(self, job: Job) -> Path:
        """Where this attempt's folder is, or would be."""
        return self.root / job.id / str(job.token)

    def folder(self, job: Job) -> Path:
        """An empty folder for this attempt; finished videos that are too old make room for it."""
        for facts in self.root.glob(f"*/*/{FACTS}"):
            if not _fresh(facts):
                self.discard(facts.parent)
        folder = self.attempt(job)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def finished(self, job_id: str) -> Path | None:
        """A whole video of this job, from whichever attempt (same request and seed: same video)."""
        for folder in sorted((self.root / job_id).glob("*")):
            if read_facts(folder) is not None:
                return folder
        return None

    def drop(self, job_id: str) -> None:
        """Remove everything of a job."""
        shutil.rmtree(self.root / job_id, ignore_errors=True)

    def discard(self, folder: Path) -> None:
        """Remove one attempt's folder alone: another attempt of the same job may be at work beside it."""
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.parent.rmdir()  # only when it is empty

    def tidy(self) -> Iterator[tuple[str, int, Path]]:
        """Remove half-written and old folders; yield (job id, token, folder) of the finished ones.

        For the start, before anything is written.
        """
        for folder in sorted(self.root.glob("*/*")):
            if _fresh(folder / FACTS) and folder.name.isdigit():
                yield folder.parent.name, int(folder.name), folder
            else:
                shutil.rmtree(folder, ignore_errors=True)


def _fresh(facts: Path) -> bool:
    """Whether a video is finished, and since less than KEEP_SECONDS."""
    try:
        return time.time() - facts.stat().st_mtime < KEEP_SECONDS
    except FileNotFoundError:  # the publisher may be done with it just now
        return False

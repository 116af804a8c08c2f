"""``Prefer: wait=n`` (RFC 7240): hold an answer until the job has moved, without a thread waiting for it."""

import re
import time
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Header
from fastapi.concurrency import run_in_threadpool

from api.auth import ServicesDep
from api.services import Services
from jobs.events import START
from jobs.job import Job

WAIT = re.compile(r"(?:^|[,;\s])wait\s*=\s*\"?(\d{1,6})\"?(?:$|[,;\s])", re.IGNORECASE)


@dataclass(frozen=True)
class Preference:
    """How many seconds the client would wait; 0 when it asked for nothing."""

    seconds: int

    @property
    def applied(self) -> dict[str, str]:
        """The header that confirms it."""
        return {"Preference-Applied": f"wait={self.seconds}"} if self.seconds else {}


def preference(
    svc: ServicesDep,
    prefer: Annotated[
        str | None,
        Header(
            description="`wait=n`: answer when the job has ended, or after n seconds.", examples=["wait=30"]
        ),
    ] = None,
) -> Preference:
    """The Prefer header; a preference that isn't understood is ignored, as RFC 7240 says."""
    found = WAIT.search(prefer or "")
    return Preference(min(int(found[1]), svc.settings.max_wait_seconds) if found else 0)


Prefer = Annotated[Preference, Depends(preference)]


async def wait_for_end(svc: Services, job: Job, seconds: float) -> Job:
    """The job as soon as it has ended, or as it is after `seconds`."""
    return await _wait(svc, job, seconds, any_change=False)


async def wait_for_change(svc: Services, job: Job, seconds: float) -> Job:
    """The job as soon as its version has risen, or as it is after `seconds`."""
    return await _wait(svc, job, seconds, any_change=True)


async def _wait(svc: Services, job: Job, seconds: float, any_change: bool) -> Job:
    until = time.monotonic() + seconds
    version = job.version
    after = START
    async with svc.watcher.subscribe(job.id) as subscription:
        while not job.terminal and not svc.stopping.is_set():
            left = until - time.monotonic()
            events = await subscription.read(after, max(0.0, left))
            after = events[-1].id if events else after
            job = await run_in_threadpool(svc.jobs.get, job.id)
            if left <= 0 or (any_change and job.version != version):
                break
    return job

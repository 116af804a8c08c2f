"""``GET /v1/jobs/{id}/events``: a job's life as server-sent events."""

import json
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse

from api import problem as p
from api.auth import ReadKey, ServicesDep
from api.errors import invalid
from api.problem import documented
from api.routes.jobs import OWN, JobId, find
from api.services import Services
from jobs.errors import FieldProblem, JobNotFound, StoreUnavailable
from jobs.events import START, valid_event_id

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])
ENDS = frozenset({"job.succeeded", "job.failed", "job.canceled", "job.expired"})
HEADERS = {
    "Cache-Control": "no-store, no-transform",  # no-transform: a proxy that compresses would hold events back
    "X-Accel-Buffering": "no",  # nginx
}
EXAMPLE = (
    ": open\nretry: 2000\n"
    "id: 1763976600000-0\nevent: job.progress\n"
    'data: {"id":"job_0m7f...","state":"running","phase":"denoising","step":14,"progress":0.35,'
    '"eta_seconds":32.5,"attempts":0,"cancel_requested":false,"version":17,"error":null}\n\n'
)
DOC: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "An endless `text/event-stream`, closed after the job's end. Events: `job.queued`, "
        "`job.started`, `job.progress`, `job.cancel_requested`, `job.succeeded`, `job.failed`, "
        "`job.canceled`, `job.expired`; `data` is JSON with the job's state. "
        "Lines that begin with a colon are heartbeats.",
        "content": {"text/event-stream": {"schema": {"type": "string"}, "example": EXAMPLE}},
    },
    204: {"description": "The job has ended and Last-Event-ID is its last event: do not reconnect."},
}


@router.get(
    "/{job_id}/events",
    response_class=StreamingResponse,
    summary="Follow a job",
    responses={**DOC, **documented(*OWN)},
)
async def events(
    request: Request,
    svc: ServicesDep,
    key: ReadKey,
    job_id: JobId,
    last_event_id: Annotated[
        str | None, Header(description="Go on after this event; sent by browsers when they reconnect.")
    ] = None,
    after: Annotated[str | None, Query(description="The same, for clients that can't set headers.")] = None,
) -> Response:
    """Everything that has happened to the job, then what happens next, until it ends."""
    start = last_event_id or after or START
    if not valid_event_id(start):
        raise invalid([FieldProblem("Last-Event-ID", p.shorten(start), "the `id` of an event, or nothing")])
    job = await run_in_threadpool(find, svc, key, job_id)
    if job.terminal:
        async with svc.watcher.subscribe(job_id, start) as subscription:
            if not await subscription.read(start, 0):
                return Response(status_code=204)
    return StreamingResponse(_stream(svc, job_id, start), media_type="text/event-stream", headers=HEADERS)


async def _stream(svc: Services, job_id: str, after: str) -> AsyncIterator[str]:
    svc.metrics.streams.inc()
    try:
        # Comments end in one newline: some clients take any blank line for an event.
        yield ": open\n"
        retry = "retry: 2000\n"
        async with svc.watcher.subscribe(job_id, after) as subscription:
            over = False
            while not svc.stopping.is_set():
                batch = await subscription.read(after, 0 if over else svc.settings.heartbeat_seconds)
                for event in batch:
                    data = json.dumps(event.data, ensure_ascii=False, separators=(",", ":"))
                    yield f"{retry}id: {event.id}\nevent: {event.type}\ndata: {data}\n\n"
                    after, retry = event.id, ""
                if over or (batch and batch[-1].type in ENDS):
                    return
                if not batch:
                    yield ": heartbeat\n"
                    # Once more before the end: events may have come between the read and this look.
                    over = await run_in_threadpool(_over, svc, job_id)
    except StoreUnavailable:
        return  # the client reconnects with Last-Event-ID and gets a 503 with Retry-After until Redis is back
    finally:
        svc.metrics.streams.dec()


def _over(svc: Services, job_id: str) -> bool:
    """Whether no more events will come, for a stream that slept through the end or whose job was deleted."""
    try:
        job = svc.jobs.get(job_id)
    except JobNotFound:
        return True
    return job.terminal

"""From stored records to what clients see."""

import hashlib
from datetime import UTC, datetime

from fastapi import Request, Response
from pydantic import BaseModel

from api.schemas import ErrorOut, JobOut, Links, RequestOut, ResultOut
from api.services import Services
from jobs.job import Job, JobState


def when(seconds: float | None) -> datetime | None:
    """Unix seconds as an aware UTC time."""
    return None if seconds is None else datetime.fromtimestamp(round(seconds, 3), UTC)


def base_url(request: Request, svc: Services) -> str:
    """This API's address as the client sees it, without a trailing slash."""
    return (svc.settings.public_url or str(request.base_url)).rstrip("/")


def links(base: str, job_id: str) -> Links:
    """The addresses of a job and of what belongs to it."""
    root = f"{base}/v1/jobs/{job_id}"
    return Links(
        self=root,
        events=f"{root}/events",
        cancel=f"{root}/cancel",
        video=f"{root}/video",
        poster=f"{root}/poster",
        webhooks=f"{root}/webhooks",
    )


def job_view(svc: Services, job: Job, base: str, position: int | None) -> JobOut:
    """A job as clients see it; what only nodes need (owner, token, lease, storage keys) stays inside."""
    request = job.request.model_dump()
    request["image"] = image_name(job.request.image)
    return JobOut(
        id=job.id,
        state=job.state,
        progress=1.0 if job.state is JobState.SUCCEEDED else round(job.progress, 4),
        phase=job.phase if job.state is JobState.RUNNING else None,
        step=job.step,
        eta_seconds=svc.forecast.eta(job) if job.state is JobState.RUNNING else None,
        queue_position=position,
        estimated_start_at=when(svc.forecast.start_at(job, position)),
        attempts=job.attempts,
        cancel_requested=job.cancel_requested,
        model=job.request.model,
        priority=job.priority,
        request=RequestOut(**request),
        result=ResultOut(**job.result.model_dump()) if job.result else None,
        error=ErrorOut(**job.error.model_dump()) if job.error else None,
        metadata=job.metadata,
        callback_url=job.callback_url,
        webhook_events=list(job.webhook_events),
        created_at=datetime.fromtimestamp(round(job.created_at, 3), UTC),
        started_at=when(job.started_at),
        finished_at=when(job.finished_at),
        deadline_at=when(job.deadline_at),
        links=links(base, job.id),
    )


def image_name(storage_key: str | None) -> str | None:
    """The upload's id from its storage key ``uploads/<key id>/<id>.png``."""
    return None if storage_key is None else storage_key.rsplit("/", 1)[-1].split(".", 1)[0]


def show(request: Request, svc: Services, job: Job) -> JobOut:
    """The job's view, with its place in the queue."""
    position = svc.jobs.position(job.id) if job.state is JobState.QUEUED else None
    return job_view(svc, job, base_url(request, svc), position)


def json_response(body: BaseModel, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """`body` as JSON, private to the key that asked."""
    return Response(
        body.model_dump_json(by_alias=True),
        status,
        {"Cache-Control": "private, no-cache", **(headers or {})},
        media_type="application/json",
    )


def etagged(
    request: Request, body: BaseModel, status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    """`body` with a strong ETag; 304 when a GET's If-None-Match has it already."""
    text = body.model_dump_json(by_alias=True).encode()
    etag = etag_of(text)
    fields = {"Cache-Control": "private, no-cache", "ETag": etag, "Vary": "Authorization", **(headers or {})}
    if request.method == "GET" and matches(request.headers.get("if-none-match"), etag):
        return Response(status_code=304, headers=fields)
    return Response(text, status, fields, media_type="application/json")


def etag_of(text: bytes) -> str:
    """A strong ETag of the exact bytes: it changes with the queue position as well as with the job."""
    return f'"{hashlib.sha256(text).hexdigest()[:32]}"'


def matches(header: str | None, etag: str) -> bool:
    """Whether an If-None-Match header names `etag` (weak comparison, RFC 9110 section 13.1.2)."""
    if header is None:
        return False
    tags = [tag.strip().removeprefix("W/") for tag in header.split(",")]
    return "*" in tags or etag in tags

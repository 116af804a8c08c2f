"""``/v1/jobs``: submit, read, list, cancel, delete."""

import re
from contextlib import suppress
from typing import Annotated

from fastapi import APIRouter, Header, Path, Query, Request, Response
from fastapi.concurrency import run_in_threadpool

from api import problem as p
from api.auth import ReadKey, ServicesDep, SubmitKey, view_of
from api.bodies import read_object
from api.errors import invalid
from api.problem import documented
from api.schemas import JOB_ID, JobOut, JobPage
from api.services import Services
from api.submit import submit_job
from api.views import base_url, etagged, job_view, json_response, show
from api.waiting import Prefer, wait_for_change, wait_for_end
from jobs.errors import FieldProblem, IllegalTransition, JobNotFound, StorageUnavailable
from jobs.job import Job, JobState
from jobs.keys import ApiKey

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

# Anything is taken as an id here and answered with 404, so that a probe learns nothing from a 422.
JobId = Annotated[str, Path(description="The job's id.", examples=[JOB_ID], max_length=200)]
COMMON = (p.UNAUTHENTICATED, p.FORBIDDEN, p.RATE_LIMITED, p.UNAVAILABLE, p.HEADERS_TOO_LARGE)
OWN = (*COMMON, p.NOT_FOUND, p.INVALID_REQUEST)
BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/JobIn"}}},
    }
}


def is_job_id(text: str) -> bool:
    """Whether this can be a job's id. Lists go on after one; the queue would take any other for none."""
    return re.fullmatch(r"job_[0-9a-z]{25}", text) is not None


def find(svc: Services, key: ApiKey, job_id: str) -> Job:
    """The job, if this key may see it. Raises JobNotFound alike for another key's job and for none."""
    job = svc.jobs.get(job_id)
    if view_of(key) not in ("*", job.key_id):
        raise JobNotFound(p.shorten(job_id))
    return job


@router.post(
    "",
    status_code=202,
    response_model=JobOut,
    summary="Submit a job",
    openapi_extra=BODY,
    responses={
        200: {"model": JobOut, "description": "With `Prefer: wait`: the job has already ended."},
        202: {
            "description": "Accepted. With a repeated `Idempotency-Key` this is the first request's job and "
            "`Idempotent-Replayed: true` is set.",
            "headers": {"Location": {"description": "The job.", "schema": {"type": "string"}}},
        },
        **documented(
            *COMMON, p.INVALID_REQUEST, p.IDEMPOTENCY_CONFLICT, p.MALFORMED_JSON, p.UNSUPPORTED_MEDIA_TYPE,
            p.BODY_TOO_LARGE, p.BODY_TIMEOUT, p.QUEUE_FULL, p.NO_MODEL,
        ),
    },
)  # fmt: skip
async def submit(
    request: Request,
    svc: ServicesDep,
    key: SubmitKey,
    prefer: Prefer,
    idempotency_key: Annotated[
        str | None,
        Header(
            description="1 to 255 visible characters, new for each new request: repeating a request with "
            "them can't make a second job. Kept for 24 hours.",
            max_length=255,
            pattern=r"^[\x21-\x7e]+$",
            examples=["5c0f6a52-9a5e-4f0e-8c53-5d1f4dd1b0c3"],
        ),
    ] = None,
) -> Response:
    """Put a video in the queue.

    Only `prompt` is needed; the model's defaults fill in the rest (`GET /v1/models` shows them). The answer
    is the job; follow its `links`. Unknown fields are refused, and every wrong field is named at once.
    """
    data = await read_object(request)
    job, created = await submit_job(svc, key, data, idempotency_key)
    if prefer.seconds:
        job = await wait_for_end(svc, job, prefer.seconds)
    view = await run_in_threadpool(show, request, svc, job)
    headers = {"Location": view.links.self, **prefer.applied}
    if not created:
        headers["Idempotent-Replayed"] = "true"
    return etagged(request, view, 200 if job.terminal and prefer.seconds else 202, headers)


@router.get(
    "",
    response_model=JobPage,
    summary="List jobs",
    responses={304: {"description": "Nothing has changed."}, **documented(*COMMON, p.INVALID_REQUEST)},
)
def list_jobs(
    request: Request,
    svc: ServicesDep,
    key: ReadKey,
    state: Annotated[JobState | None, Query(description="Only jobs in this state.")] = None,
    model: Annotated[str | None, Query(description="Only jobs of this model.", max_length=100)] = None,
    ref: Annotated[
        str | None,
        Query(alias="metadata.ref", description="Only jobs with this `metadata.ref`.", max_length=500),
    ] = None,
    cursor: Annotated[
        str | None, Query(description="`next_cursor` of the page before.", max_length=100, examples=[None])
    ] = None,
    limit: Annotated[int, Query(ge=1, le=100, description="Jobs a page.")] = 20,
) -> Response:
    """Jobs of this key, newest first (an admin key sees those of all keys).

    Pages are stable: jobs that arrive meanwhile don't shift them. With several filters a page may be shorter
    than `limit`, or empty, though `has_more` is true: go on with `next_cursor`.
    """
    if cursor is not None and not is_job_id(cursor):
        raise invalid([FieldProblem("cursor", p.shorten(cursor), "a `next_cursor` from an earlier page")])
    found, following = svc.jobs.list(
        view_of(key), state=state, model=model, ref=ref, cursor=cursor, limit=limit
    )
    base = base_url(request, svc)
    page = JobPage(
        data=[job_view(svc, job, base, _position(svc, job)) for job in found],
        has_more=following is not None,
        next_cursor=following,
    )
    headers = {}
    if following is not None:
        onward = request.url.include_query_params(cursor=following)
        headers["Link"] = f'<{base}{onward.path}?{onward.query}>; rel="next"'
    return etagged(request, page, headers=headers)


def _position(svc: Services, job: Job) -> int | None:
    """The place in the queue, or None when the job left it, or was deleted, since it was listed."""
    if job.state is not JobState.QUEUED:
        return None
    try:
        return svc.jobs.position(job.id)
    except JobNotFound:
        return None


@router.get(
    "/{job_id}",
    response_model=JobOut,
    summary="Read a job",
    responses={
        304: {"description": "Nothing has changed since the ETag in If-None-Match."},
        **documented(*OWN),
    },
)
async def read(
    request: Request,
    svc: ServicesDep,
    key: ReadKey,
    job_id: JobId,
    prefer: Prefer,
    if_none_match: Annotated[str | None, Header(description="An ETag: answer 304 if it still holds.")] = None,
) -> Response:
    """The job now.

    To poll cheaply, send the last answer's `ETag` as `If-None-Match`. With `Prefer: wait=n` the answer comes
    when the job ends or after n seconds; together with `If-None-Match`, as soon as anything changes.
    """
    job = await run_in_threadpool(find, svc, key, job_id)
    if prefer.seconds and not job.terminal:
        if if_none_match is None:
            job = await wait_for_end(svc, job, prefer.seconds)
        elif etagged(request, await run_in_threadpool(show, request, svc, job)).status_code == 304:
            job = await wait_for_change(svc, job, prefer.seconds)
    return etagged(request, await run_in_threadpool(show, request, svc, job), headers=prefer.applied)


@router.delete(
    "/{job_id}",
    status_code=204,
    summary="Delete an ended job",
    responses={204: {"description": "The job and its files are gone."}, **documented(*OWN, p.WRONG_STATE)},
)
def delete(svc: ServicesDep, key: SubmitKey, job_id: JobId) -> Response:
    """Delete a job that has ended, with its video. A live one answers 409: cancel it first."""
    remove(svc, find(svc, key, job_id))
    return Response(status_code=204)


def remove(svc: Services, job: Job) -> None:
    """Delete the record, then the files, if S3 answers; a sweep removes what stays behind."""
    if not job.terminal:
        raise IllegalTransition(job.id, job.state.value, "deleted; cancel it first")
    svc.jobs.delete(job.id)
    if svc.storage_check.look().ok:
        with suppress(StorageUnavailable):
            svc.quick_storage.delete_prefix(f"jobs/{job.id}/")


@router.post(
    "/{job_id}/cancel",
    response_model=JobOut,
    summary="Cancel a job",
    responses={
        202: {"model": JobOut, "description": "The node will stop at its next step."},
        **documented(*OWN, p.WRONG_STATE),
    },
)
def cancel(request: Request, svc: ServicesDep, key: SubmitKey, job_id: JobId) -> Response:
    """Stop a job. A queued one is canceled at once (200); a running one stops at its next step (202, with
    `cancel_requested` set); one that has ended answers 409."""
    find(svc, key, job_id)
    job = svc.jobs.cancel(job_id)
    view = show(request, svc, job)
    return json_response(view, 200 if job.terminal else 202)

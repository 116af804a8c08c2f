"""``/v1/videos``: the same jobs in the shape that the `openai` package sends and reads.

Thin: a form becomes the native body, a job becomes its video object. Field names in errors are mapped back,
so that the package's exceptions carry `param` as the caller knows it.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Path, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

from api import problem as p
from api.auth import ReadKey, ServicesDep, SubmitKey, view_of
from api.bodies import load_object
from api.errors import invalid
from api.images import store_image
from api.inputs import body_hash
from api.openai_shape import BODY, VideoDeleted, VideoOut, VideoPage, native_body, renamed, video_view
from api.problem import ProblemError, documented
from api.routes.jobs import find, is_job_id, remove
from api.routes.media import sign
from api.services import Services
from api.submit import choose_model, repeated, submit_new
from api.views import json_response
from jobs.errors import FieldProblem
from jobs.job import Job

router = APIRouter(prefix="/v1/videos", tags=["openai"])
VideoId = Annotated[str, Path(description="The video's id: the job's.", max_length=200)]
COMMON = (
    p.UNAUTHENTICATED,
    p.FORBIDDEN,
    p.RATE_LIMITED,
    p.UNAVAILABLE,
    p.HEADERS_TOO_LARGE,
    p.INVALID_REQUEST,
)
POLL = {"openai-poll-after-ms": "1000"}  # the package's poll helper reads it


async def read_fields(request: Request) -> dict[str, Any]:
    """The form's (or JSON's) fields; `input_reference` may be a file, as bytes. Raises ProblemError."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind == "application/json":
        return load_object(await request.body())
    if kind not in ("multipart/form-data", "application/x-www-form-urlencoded"):
        allowed = "multipart/form-data, application/x-www-form-urlencoded or application/json"
        raise ProblemError(
            p.UNSUPPORTED_MEDIA_TYPE,
            f"This route takes {allowed}.",
            [FieldProblem("Content-Type", p.shorten(kind) or "none", allowed)],
        )
    fields: dict[str, Any] = {}
    async with request.form(max_files=1, max_fields=32, max_part_size=65_536) as form:
        for name, value in form.multi_items():
            if name in fields:
                raise invalid([FieldProblem(p.shorten(name), "twice", "once")])
            fields[name] = await value.read() if isinstance(value, UploadFile) else value
    for name, value in fields.items():
        if isinstance(value, bytes) and name != "input_reference":
            raise invalid([FieldProblem(p.shorten(name), "a file", "a text")])
    return fields


def sent_hash(fields: Mapping[str, Any]) -> str:
    """The hash of a request as it was sent: a file counts by its content, not by the id it will be given."""
    return body_hash(
        {
            name: {"sha256": hashlib.sha256(value).hexdigest()} if isinstance(value, bytes) else value
            for name, value in fields.items()
        }
    )


@router.post(
    "",
    response_model=VideoOut,
    summary="Create a video",
    openapi_extra=BODY,
    responses=documented(
        *COMMON, p.MALFORMED_JSON, p.UNSUPPORTED_MEDIA_TYPE, p.BODY_TOO_LARGE, p.BODY_TIMEOUT, p.QUEUE_FULL,
        p.NO_MODEL, p.IDEMPOTENCY_CONFLICT, openai=True,
    ),
)  # fmt: skip
async def create(
    request: Request,
    svc: ServicesDep,
    key: SubmitKey,
    idempotency_key: Annotated[str | None, Header(max_length=255, pattern=r"^[\x21-\x7e]+$")] = None,
) -> Response:
    """Queue a video: `client.videos.create(prompt=..., size="1280x720", seconds="5")`.

    Of our own fields, `seed`, `negative_prompt`, `sampling_steps`, `guide_scale`, `shift` and `sample_solver`
    may come along (`extra_body`).
    """
    fields = await read_fields(request)
    digest = sent_hash(fields)
    earlier = await repeated(svc, key, idempotency_key, digest)
    if earlier is not None:
        return json_response((await run_in_threadpool(views, svc, [earlier]))[0], headers=POLL)
    wrong: dict[str, FieldProblem] = {}
    card = await run_in_threadpool(choose_model, svc, fields.get("model") or None, wrong)
    if card is None:
        raise invalid(list(wrong.values()))
    reference = fields.get("input_reference")
    if isinstance(reference, bytes):
        stored = await store_image(svc, key, reference, "input_reference")
        fields["input_reference"] = stored.id
    body = native_body(fields, card)
    try:
        job, _ = await submit_new(svc, key, body, idempotency_key, digest)
    except ProblemError as error:
        raise ProblemError(error.kind, error.detail, renamed(error.errors), error.headers) from None
    return json_response(video_view(job, card.fps, svc.settings.retention_seconds), headers=POLL)


def views(svc: Services, found: Sequence[Job]) -> list[VideoOut]:
    """Video objects of jobs; the models' cards give the frame rates."""
    fps = {card.name: card.fps for card in svc.nodes.models()}
    return [
        video_view(job, fps.get(job.request.model, 16.0), svc.settings.retention_seconds) for job in found
    ]


@router.get("", response_model=VideoPage, summary="List videos", responses=documented(*COMMON, openai=True))
def list_videos(
    svc: ServicesDep,
    key: ReadKey,
    after: Annotated[str | None, Query(description="The last id of the page before.", max_length=100)] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Annotated[Literal["desc"], Query(description="Newest first is the only order.")] = "desc",
) -> Response:
    """This key's videos, newest first."""
    if after is not None and not is_job_id(after):
        raise invalid([FieldProblem("after", p.shorten(after), "the id of a video")])
    found, following = svc.jobs.list(view_of(key), cursor=after, limit=limit)
    data = views(svc, found)
    return json_response(
        VideoPage(
            data=data,
            first_id=data[0].id if data else None,
            last_id=data[-1].id if data else None,
            has_more=following is not None,
        )
    )


@router.get(
    "/{video_id}",
    response_model=VideoOut,
    summary="Retrieve a video",
    responses=documented(*COMMON, p.NOT_FOUND, openai=True),
)
def retrieve(svc: ServicesDep, key: ReadKey, video_id: VideoId) -> Response:
    """The video object now."""
    return json_response(views(svc, [find(svc, key, video_id)])[0], headers=POLL)


@router.delete(
    "/{video_id}",
    response_model=VideoDeleted,
    summary="Delete a video",
    responses=documented(*COMMON, p.NOT_FOUND, p.WRONG_STATE, openai=True),
)
def delete(svc: ServicesDep, key: SubmitKey, video_id: VideoId) -> Response:
    """Delete a completed or failed video and its files."""
    job = find(svc, key, video_id)
    remove(svc, job)
    return json_response(VideoDeleted(id=job.id))


@router.get(
    "/{video_id}/content",
    status_code=302,
    response_class=Response,
    summary="Download a video",
    responses={
        302: {
            "description": "The file's presigned address.",
            "headers": {"Location": {"description": "The presigned URL.", "schema": {"type": "string"}}},
        },
        **documented(*COMMON, p.NOT_FOUND, p.WRONG_STATE, openai=True),
    },
)
def content(
    svc: ServicesDep,
    key: ReadKey,
    video_id: VideoId,
    variant: Annotated[
        Literal["video", "thumbnail"], Query(description="The MP4, or a JPEG still.")
    ] = "video",
) -> Response:
    """A redirect to the MP4 or its still, which the package follows (without sending the key along)."""
    signed = sign(svc, find(svc, key, video_id), "video" if variant == "video" else "poster", download=False)
    headers: Mapping[str, str] = {"Location": signed.url, "Cache-Control": "no-store"}
    return Response(status_code=302, headers=headers)

"""``/v1/jobs/{id}/video`` and ``/poster``: presigned addresses of a finished job's files."""

from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response

from api import problem as p
from api.auth import ReadKey, ServicesDep
from api.problem import ProblemError, documented
from api.routes.jobs import OWN, JobId, find
from api.schemas import SignedUrl
from api.services import Services
from api.views import json_response
from jobs.job import Job

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])
File = Literal["video", "poster"]
NAMES = {"video": ("video_key", "mp4"), "poster": ("poster_key", "jpg")}
DOC: dict[int | str, dict[str, Any]] = {
    200: {"model": SignedUrl, "description": "With `Accept: application/json`: the address itself."},
    302: {
        "description": "The file's presigned address. It lives short, names one object, and needs no key.",
        "headers": {"Location": {"description": "The presigned URL.", "schema": {"type": "string"}}},
    },
    **documented(*OWN, p.WRONG_STATE),
}


def sign(svc: Services, job: Job, file: File, download: bool) -> SignedUrl:
    """A presigned address of one of the job's files. Raises ProblemError when the job has not succeeded."""
    if job.result is None:
        raise ProblemError(p.WRONG_STATE, f"The job is {job.state.value}; it gets a {file} by succeeding.")
    attribute, ending = NAMES[file]
    seconds = svc.settings.presign_seconds
    name = f"{job.id}.{ending}" if download else None
    # Rounded down before signing, so the promise is never longer than the signature.
    expires_at = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=seconds)
    url = svc.storage.presign_get(getattr(job.result, attribute), seconds, name)
    return SignedUrl(url=url, expires_at=expires_at)


def answer(request: Request, signed: SignedUrl) -> Response:
    """The address as JSON for those who ask for JSON, else a redirect to it."""
    accepted = request.headers.get("accept", "").lower()
    if "application/json" in accepted:
        return json_response(signed, headers={"Cache-Control": "no-store", "Vary": "Accept"})
    return Response(
        status_code=302, headers={"Location": signed.url, "Cache-Control": "no-store", "Vary": "Accept"}
    )


Download = Annotated[
    bool, Query(description="The address makes browsers save the file instead of showing it.")
]


@router.get(
    "/{job_id}/video", summary="Get the video", status_code=302, response_class=Response, responses=DOC
)
def video(
    request: Request, svc: ServicesDep, key: ReadKey, job_id: JobId, download: Download = False
) -> Response:
    """The finished MP4 (H.264, yuv420p, fast start). 409 until the job has succeeded."""
    return answer(request, sign(svc, find(svc, key, job_id), "video", download))


@router.get(
    "/{job_id}/poster", summary="Get the poster", status_code=302, response_class=Response, responses=DOC
)
def poster(
    request: Request, svc: ServicesDep, key: ReadKey, job_id: JobId, download: Download = False
) -> Response:
    """A JPEG still of the video. 409 until the job has succeeded."""
    return answer(request, sign(svc, find(svc, key, job_id), "poster", download))

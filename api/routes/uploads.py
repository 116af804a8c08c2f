"""``POST /v1/uploads``: input images, checked and written anew before anything else sees them."""

from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.datastructures import UploadFile

from api import problem as p
from api.auth import ServicesDep, SubmitKey
from api.errors import invalid
from api.images import store_image
from api.problem import ProblemError, documented
from api.routes.jobs import COMMON
from api.schemas import UploadOut
from api.views import json_response
from jobs.errors import FieldProblem

router = APIRouter(prefix="/v1/uploads", tags=["uploads"])
TYPES = ("image/png", "image/jpeg", "image/webp")
BINARY = {"schema": {"type": "string", "format": "binary"}}
BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "The file itself, or a form with the file in the field `file`.",
        "content": {
            **dict.fromkeys(TYPES, BINARY),
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {"file": {"type": "string", "format": "binary"}},
                }
            },
        },
    }
}


async def read_file(request: Request) -> bytes:
    """The image's bytes from the body or from the form's field `file`. Raises ProblemError."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind in TYPES:
        return await request.body()
    if kind != "multipart/form-data":
        allowed = ", ".join((*TYPES, "multipart/form-data"))
        raise ProblemError(
            p.UNSUPPORTED_MEDIA_TYPE,
            "This route takes an image, or a form with one.",
            [FieldProblem("Content-Type", p.shorten(kind) or "none", f"one of {allowed}")],
        )
    async with request.form(max_files=1, max_fields=4) as form:
        file = form.get("file")
        if not isinstance(file, UploadFile):
            got = "nothing" if file is None else "a text"
            raise invalid([FieldProblem("file", got, "a file in the form's field `file`")])
        return await file.read()


@router.post(
    "",
    status_code=201,
    response_model=UploadOut,
    summary="Upload an input image",
    openapi_extra=BODY,
    responses=documented(
        *COMMON, p.INVALID_REQUEST, p.BAD_REQUEST, p.UNSUPPORTED_MEDIA_TYPE, p.BODY_TOO_LARGE, p.BODY_TIMEOUT
    ),
)
async def upload(request: Request, svc: ServicesDep, key: SubmitKey) -> Response:
    """Store a PNG, JPEG or WebP for a job's `image`.

    It is decoded and written anew as PNG: upright, without metadata, at most 2560 pixels on the longer side.
    It is kept for the retention time after its upload or the end of the last job that uses it.
    """
    data = await read_file(request)
    return json_response(await store_image(svc, key, data, "file"), 201)

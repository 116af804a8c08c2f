"""Input images: how a request names them, and how they come into storage."""

import re
from typing import Any

from anyio import to_thread
from fastapi.concurrency import run_in_threadpool

from api.errors import invalid
from api.problem import RATE_LIMITED, ProblemError, shorten
from api.sanitize import CleanImage, ImageRefusedError, TooManyFetches, clean_image, fetch_image
from api.schemas import UploadOut
from api.services import Services
from jobs.errors import FieldProblem
from jobs.ids import new_id
from jobs.keys import ApiKey

UPLOAD_ID = re.compile(r"img_[0-9a-z]{25}\Z")


def storage_key(key_id: str, upload_id: str) -> str:
    """Storage key of an upload. It holds the API key's id, so one key can't name another's image."""
    return f"uploads/{key_id}/{upload_id}.png"


def is_url(name: Any) -> bool:
    """Whether a request's `image` is meant as an address rather than an upload's id."""
    return isinstance(name, str) and "://" in name


def image_key(svc: Services, key: ApiKey, name: str, wrong: dict[str, FieldProblem]) -> str | None:
    """The storage key of the upload that a request names; None after noting a problem in `wrong`."""
    if not UPLOAD_ID.match(name):
        expected = "an id (img_...) from POST /v1/uploads, or an https URL"
        wrong["image"] = FieldProblem("image", shorten(name), expected)
        return None
    found = storage_key(key.id, name)
    if not svc.uploads.known(found):
        wrong["image"] = FieldProblem("image", shorten(name), "an upload of this key; it may have expired")
        return None
    return found


async def store_image(svc: Services, key: ApiKey, data: bytes, field: str) -> UploadOut:
    """Check, re-encode and store an image of this key. Raises ProblemError that names `field`."""
    try:
        image = await clean_image(data, svc.settings.max_image_pixels)
    except ImageRefusedError as error:
        expected = f"a PNG, JPEG or WebP image: {error}"
        raise invalid([FieldProblem(field, f"{len(data)} bytes", expected)]) from None
    return await _keep(svc, key, image)


async def store_from_url(svc: Services, key: ApiKey, url: str) -> UploadOut:
    """The same for the image behind a request's `image` URL."""
    try:
        image = await fetch_image(url, svc.settings, key.id)
    except ImageRefusedError as error:
        expected = f"the address of a PNG, JPEG or WebP image: {error}"
        raise invalid([FieldProblem("image", shorten(url), expected)]) from None
    except TooManyFetches:
        detail = "Two images of this key are being fetched already."
        raise ProblemError(RATE_LIMITED, detail, headers={"Retry-After": "5"}) from None
    return await _keep(svc, key, image)


async def _keep(svc: Services, key: ApiKey, image: CleanImage) -> UploadOut:
    name = new_id("img")
    path = storage_key(key.id, name)
    await run_in_threadpool(svc.storage_check.demand)
    await run_in_threadpool(svc.uploads.add, path)  # first, so that the sweeper knows of every file
    await to_thread.run_sync(svc.storage.put_bytes, path, image.png, "image/png", limiter=svc.uploading)
    return UploadOut(
        id=name, width=image.width, height=image.height, bytes=len(image.png), content_type="image/png"
    )

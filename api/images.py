"""Input images: where they are stored, and how a request names them."""

import re

from api.problem import shorten
from api.services import Services
from jobs.errors import FieldProblem
from jobs.keys import ApiKey

UPLOAD_ID = re.compile(r"img_[0-9a-z]{25}\Z")


def storage_key(key_id: str, upload_id: str) -> str:
    """Storage key of an upload. It holds the API key's id, so one key can't name another's image."""
    return f"uploads/{key_id}/{upload_id}.png"


def image_key(svc: Services, key: ApiKey, name: str, wrong: dict[str, FieldProblem]) -> str | None:
    """The storage key of the image that a request names; None after noting a problem in `wrong`."""
    if not UPLOAD_ID.match(name):
        wrong["image"] = FieldProblem("image", shorten(name), "an id (img_...) from POST /v1/uploads")
        return None
    found = storage_key(key.id, name)
    if not svc.uploads.known(found):
        wrong["image"] = FieldProblem("image", shorten(name), "an upload of this key; it may have expired")
        return None
    return found

"""Records that are kept as JSON and changed by comparing with what was read."""

import json
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel

Record = TypeVar("Record", bound=BaseModel)


def with_fields(record: Record, old: str, fields: Mapping[str, Any]) -> tuple[Record, str]:
    """`record`, which was read from the text `old`, with these fields changed; and the text to keep.

    The change goes into what is stored, not instead of it: another release's record may have more fields.
    """
    changed = record.model_copy(update=fields)
    new = {**json.loads(old), **changed.model_dump(mode="json", include=set(fields))}
    return changed, json.dumps(new)

"""Between Redis and the types of job.py: what a record looks like when stored."""

import json
from collections.abc import Sequence
from typing import Any

from jobs.job import LATER, Job, NewJob, VideoRequest, jsonable


def to_record(new: NewJob) -> dict[str, str]:
    """The hash that submit's script stores: short values only, which Redis packs tightly."""
    wanted = [event.removeprefix("job.") for event in new.webhook_events] if new.callback_url else []
    empty = ("started_at", "finished_at", "deadline_at", "owner", "lease_until", "phase", "eta_seconds")
    image = {"image": new.request.image} if new.request.image else {}
    return {
        **image,
        **dict.fromkeys((*empty, "error", "result", "closed"), ""),
        **dict.fromkeys(("attempts", "token", "step", "progress", "cancel_requested"), "0"),
        "id": new.id,
        "schema": str(max((LATER[name] for name in _used(new.request)), default=1)),
        "key_id": new.key_id,
        "model": new.request.model,
        "ref": new.metadata.get("ref", ""),
        "priority": new.priority.value,
        "hooks": ",".join(wanted),
    }


def to_body(new: NewJob) -> str:
    """The part that never changes, as JSON."""
    data = jsonable(new)
    kept = ("request", "callback_url", "webhook_events", "metadata")
    for name in LATER.keys() - _used(new.request):
        del data["request"][name]
    return json.dumps({name: data[name] for name in kept}, ensure_ascii=False, separators=(",", ":"))


def _used(request: VideoRequest) -> set[str]:
    """The later fields that the request makes use of."""
    return {name for name in LATER if getattr(request, name) != VideoRequest.model_fields[name].default}


def pairs(flat: Sequence[str] | dict[str, str]) -> dict[str, str]:
    """A flat HGETALL reply (or one that the client has already paired) as a dict."""
    return flat if isinstance(flat, dict) else dict(zip(flat[::2], flat[1::2], strict=True))


_JSON = frozenset({"error", "result"})
_SKIP = frozenset(
    {"model", "ref", "image", "hooks", "closed", "turn", "memory_failures", "progress_hook_at", "deliveries"}
)


def from_reply(reply: Sequence[str]) -> Job:
    """The Job of a script's reply: status, record as JSON, body."""
    return from_record(json.loads(reply[1]), reply[2])


def from_record(record: Sequence[str] | dict[str, str], body: str) -> Job:
    """The Job of a stored hash and body. Empty text stands for None.

    What a newer API's request has beside the fields known here is left out: such a job can be shown, and its
    schema keeps it from being run here.
    """
    fields: dict[str, Any] = json.loads(body)
    known = VideoRequest.model_fields
    fields["request"] = {name: value for name, value in fields["request"].items() if name in known}
    for name, text in pairs(record).items():
        if text != "" and name not in _SKIP:
            fields[name] = json.loads(text) if name in _JSON else text
    return Job.model_validate(fields)

"""From a parsed body to a queued job: the same for the native route and the OpenAI façade."""

from collections.abc import Mapping
from typing import Any

from fastapi.concurrency import run_in_threadpool
from pydantic import ValidationError

from api.auth import has_scope
from api.bodies import field_problems
from api.errors import RETRY_SECONDS, invalid
from api.images import image_key, is_url, store_from_url
from api.inputs import EXPECTED, VIDEO_FIELDS, JobIn, body_hash
from api.problem import FORBIDDEN, NO_MODEL, ProblemError, shorten
from api.services import Services, live_seconds
from jobs.addresses import Address, CallbackRefused, check_callback_url
from jobs.errors import FieldProblem, InvalidRequest
from jobs.ids import new_id
from jobs.job import Job, ModelCard, NewJob, Priority, VideoRequest
from jobs.keys import ApiKey, Scope
from jobs.quality import listed
from jobs.requests import parse_and_resolve


async def submit_job(
    svc: Services, key: ApiKey, data: Mapping[str, Any], idempotency_key: str | None
) -> tuple[Job, bool]:
    """Check everything, fetch the image if it is a URL, then queue: (job, created).

    created is False when the Idempotency-Key repeats. Raises ProblemError with every wrong field at once,
    QueueFull, IdempotencyConflict, StoreUnavailable.
    """
    digest = body_hash(data)
    earlier = await repeated(svc, key, idempotency_key, digest)
    if earlier is not None:
        return earlier, False
    return await submit_new(svc, key, data, idempotency_key, digest)


async def repeated(svc: Services, key: ApiKey, idempotency_key: str | None, digest: str) -> Job | None:
    """The job that this request made when it came before.

    Looked up before anything is checked: a job that is queued stays queued, also when its image or its
    receiver's name is no longer found, or no node is there. Raises IdempotencyConflict, StoreUnavailable.
    """
    if not idempotency_key:
        return None
    return await run_in_threadpool(svc.jobs.submitted, key.id, idempotency_key, digest)


async def submit_new(
    svc: Services, key: ApiKey, data: Mapping[str, Any], idempotency_key: str | None, digest: str
) -> tuple[Job, bool]:
    """Like `submit_job` when nothing is `repeated`. digest: the hash of the body as it was sent."""
    if is_url(data.get("image")):
        await run_in_threadpool(check, svc, key, data)  # all that can be known before the fetch
        fetched = await store_from_url(svc, key, data["image"])
        data = {**data, "image": fetched.id}
    return await run_in_threadpool(accept, svc, key, data, idempotency_key, digest)


def accept(
    svc: Services, key: ApiKey, data: Mapping[str, Any], idempotency_key: str | None, digest: str
) -> tuple[Job, bool]:
    """Check and queue a body whose image, if any, is stored. digest: the body's hash, as it was sent."""
    body, request = check(svc, key, data)
    new = NewJob(
        id=new_id("job"),
        key_id=key.id,
        priority=body.priority,
        request=request,
        deadline_seconds=body.deadline_seconds,
        callback_url=body.callback_url,
        webhook_events=tuple(dict.fromkeys(body.webhook_events)),
        metadata=body.metadata,
        idempotency_key=idempotency_key,
        body_hash=digest,
        max_outstanding=key.max_outstanding,
    )
    job, created = svc.jobs.submit(new)
    if created:
        svc.metrics.submitted.labels(request.model, body.priority.value).inc()
    return job, created


def check(svc: Services, key: ApiKey, data: Mapping[str, Any]) -> tuple[JobIn, VideoRequest]:
    """The body's own fields and the resolved request. Raises ProblemError."""
    wrong: dict[str, FieldProblem] = {}
    body: JobIn | None = None
    try:
        body = JobIn.model_validate(dict(data))
    except ValidationError as error:
        for item in field_problems(error.errors(include_url=False), data, JobIn, EXPECTED):
            wrong[item.field] = item
    card = choose_model(svc, data.get("model"), wrong)
    request: VideoRequest | None = None
    if card is not None:
        try:
            request = parse_and_resolve({name: data[name] for name in VIDEO_FIELDS & data.keys()}, card)
        except InvalidRequest as error:
            named = {field.split(".")[0] for field in wrong}
            wrong |= {item.field: item for item in error.problems if item.field.split(".")[0] not in named}
    if body is not None:
        _check_callback(svc, body.callback_url, wrong)
        if request is not None and body.image is not None and not wrong:
            request = request.model_copy(update={"image": _image(svc, key, body.image, wrong)})
        if body.priority is Priority.HIGH and not has_scope(key, Scope.PRIORITY_HIGH):
            needed = FieldProblem("priority", "high", "normal or low, or a key with the scope priority_high")
            raise ProblemError(FORBIDDEN, "This key lacks the scope 'priority_high'.", [needed])
    if wrong or body is None or request is None:
        raise invalid(list(wrong.values()))
    return body, request


def choose_model(svc: Services, name: Any, wrong: dict[str, FieldProblem]) -> ModelCard | None:
    """The card of the model that was asked for, of the default, of the only one, or of the only live one.

    None after noting a problem in `wrong`. Raises ProblemError when there are no models at all.
    """
    cards = {card.name: card for card in svc.nodes.models()}
    if not cards:
        raise ProblemError(
            NO_MODEL, "No node has announced a model yet.", headers={"Retry-After": str(RETRY_SECONDS)}
        )
    if name is None:
        name = svc.settings.default_model or _only(svc, cards)
    if isinstance(name, str) and name in cards:
        presets = listed(cards[name].presets, svc.settings.forbidden)
        return cards[name].model_copy(update={"presets": presets})
    got = "nothing" if name is None else shorten(name)
    wrong["model"] = FieldProblem("model", got, "one of " + ", ".join(sorted(cards)))
    return None


def _only(svc: Services, cards: Mapping[str, ModelCard]) -> str | None:
    """The only model, or of several the only one that a live node serves: cards outlive their nodes."""
    names = cards if len(cards) == 1 else svc.nodes.live_models(live_seconds(svc.settings)) & cards.keys()
    return next(iter(names)) if len(names) == 1 else None


def _image(svc: Services, key: ApiKey, name: str, wrong: dict[str, FieldProblem]) -> str | None:
    """The image's storage key; None for a URL that may be fetched, or after noting a problem in `wrong`."""
    if is_url(name):
        check_address(svc, "image", name, wrong)
        return None
    return image_key(svc, key, name, wrong)


def _check_callback(svc: Services, url: str | None, wrong: dict[str, FieldProblem]) -> None:
    """Refuse a callback that would never be posted to."""
    if url is not None:
        check_address(svc, "callback_url", url, wrong)


def check_address(svc: Services, field: str, url: str, wrong: dict[str, FieldProblem]) -> list[Address]:
    """The addresses that a client's URL may lead to now; none after noting a problem in `wrong`.

    Whoever connects checks again, at every attempt.
    """
    settings = svc.settings
    try:
        return check_callback_url(
            url, allow_loopback=settings.allow_loopback_callbacks, allowed_hosts=settings.local_hosts
        )
    except CallbackRefused as error:
        wrong[field] = FieldProblem(field, shorten(url), str(error))
        return []

"""``/v1/webhooks``: a key's own endpoints, which hear of all its jobs; secrets, deliveries, tests."""

from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, ValidationError

from api import problem as p
from api.auth import ReadKey, ServicesDep, SubmitKey
from api.bodies import field_problems, read_object
from api.errors import invalid
from api.inputs import ENDPOINT_EXPECTED, EndpointChange, EndpointIn
from api.problem import ProblemError, documented
from api.routes.jobs import COMMON, OWN
from api.routes.webhooks import DeliveryId, delivery_view
from api.services import Services
from api.submit import check_address
from api.views import json_response
from api.webhook_schemas import (
    ENDPOINT_ID,
    DeliveryOut,
    DeliveryPage,
    EndpointCreated,
    EndpointList,
    EndpointOut,
    SecretOut,
)
from jobs.endpoints import LIMIT, Endpoint
from jobs.errors import FieldProblem
from jobs.keys import ApiKey
from jobs.vault import OVERLAP_SECONDS

router = APIRouter(prefix="/v1/webhooks", tags=["webhooks"])
EndpointId = Annotated[
    str, Path(description="The endpoint's id, `we_...`.", examples=[ENDPOINT_ID], max_length=200)
]
BODY_PROBLEMS = (
    p.INVALID_REQUEST, p.MALFORMED_JSON, p.UNSUPPORTED_MEDIA_TYPE, p.BODY_TOO_LARGE, p.BODY_TIMEOUT,
)  # fmt: skip
Body = TypeVar("Body", bound=BaseModel)
Found = TypeVar("Found")


def takes(name: str) -> dict[str, Any]:
    """A JSON body of this schema, for the OpenAPI document."""
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}
    return {"requestBody": {"required": True, "content": content}}


def find(svc: Services, key: ApiKey, endpoint_id: str) -> Endpoint:
    """The key's endpoint. Raises ProblemError alike for another key's and for none."""
    return _known(svc.endpoints.get(key.id, endpoint_id), endpoint_id)


def _known(found: Found | None, endpoint_id: str) -> Found:
    if found is None:
        raise ProblemError(p.NOT_FOUND, f"No webhook endpoint {p.shorten(endpoint_id)}.")
    return found


def view(svc: Services, endpoint: Endpoint) -> EndpointOut:
    """An endpoint as its key sees it."""
    return EndpointOut(
        **endpoint.model_dump(include={"id", "url", "events", "description", "enabled"}),
        gone=svc.outbox.gone(endpoint.url),
        created_at=datetime.fromtimestamp(round(endpoint.created_at, 3), UTC),
    )


async def read_body(request: Request, svc: Services, model: type[Body]) -> Body:
    """The request's body as `model`, its URL checked. Raises ProblemError with every wrong field."""
    data = await read_object(request)
    wrong: dict[str, FieldProblem] = {}
    body: Body | None = None
    try:
        body = model.model_validate(data)
    except ValidationError as error:
        for item in field_problems(error.errors(include_url=False), data, model, ENDPOINT_EXPECTED):
            wrong[item.field] = item
    url = data.get("url")
    if isinstance(url, str) and "url" not in wrong:
        await run_in_threadpool(check_address, svc, "url", url, wrong)
    if wrong or body is None:
        raise invalid(list(wrong.values()))
    return body


@router.post(
    "",
    status_code=201,
    response_model=EndpointCreated,
    summary="Add a webhook endpoint",
    openapi_extra=takes("EndpointIn"),
    responses=documented(*COMMON, *BODY_PROBLEMS, p.TOO_MANY),
)
async def add(request: Request, svc: ServicesDep, key: SubmitKey) -> Response:
    """An address that hears of all this key's jobs from now on, besides any job's own `callback_url`.

    The answer holds the secret that its deliveries are signed with, this once. A key may have 10 endpoints.
    """
    body = await read_body(request, svc, EndpointIn)
    events = tuple(dict.fromkeys(body.events))
    made = await run_in_threadpool(svc.endpoints.add, key.id, body.url, events, body.description)
    if made is None:
        raise ProblemError(p.TOO_MANY, f"This key has {LIMIT} webhook endpoints already.")
    endpoint, secret = made
    shown = await run_in_threadpool(view, svc, endpoint)
    return json_response(EndpointCreated(**shown.model_dump(), secret=secret), 201)


@router.get("", response_model=EndpointList, summary="List webhook endpoints", responses=documented(*COMMON))
def list_endpoints(svc: ServicesDep, key: ReadKey) -> Response:
    """This key's endpoints, oldest first, without their secrets."""
    return json_response(EndpointList(data=[view(svc, one) for one in svc.endpoints.list(key.id)]))


@router.get(
    "/{endpoint_id}",
    response_model=EndpointOut,
    summary="Read a webhook endpoint",
    responses=documented(*OWN),
)
def read(svc: ServicesDep, key: ReadKey, endpoint_id: EndpointId) -> Response:
    """One endpoint, without its secret."""
    return json_response(view(svc, find(svc, key, endpoint_id)))


@router.patch(
    "/{endpoint_id}",
    response_model=EndpointOut,
    summary="Change a webhook endpoint",
    openapi_extra=takes("EndpointChange"),
    responses=documented(*OWN, *BODY_PROBLEMS),
)
async def change(request: Request, svc: ServicesDep, key: SubmitKey, endpoint_id: EndpointId) -> Response:
    """Change its address, events or description, or silence it. Its secret stays."""
    await run_in_threadpool(find, svc, key, endpoint_id)
    body = await read_body(request, svc, EndpointChange)
    fields = body.model_dump(exclude_none=True)
    found = await run_in_threadpool(svc.endpoints.change, key.id, endpoint_id, **fields)
    changed = _known(found, endpoint_id)  # it may have been deleted since
    return json_response(await run_in_threadpool(view, svc, changed))


@router.delete(
    "/{endpoint_id}",
    status_code=204,
    summary="Delete a webhook endpoint",
    responses={204: {"description": "It hears no more; its secret is gone."}, **documented(*OWN)},
)
def delete(svc: ServicesDep, key: SubmitKey, endpoint_id: EndpointId) -> Response:
    """Forget an endpoint. What still waits for it is not sent."""
    find(svc, key, endpoint_id)
    svc.endpoints.remove(key.id, endpoint_id)
    return Response(status_code=204)


@router.post(
    "/{endpoint_id}/rotate",
    response_model=SecretOut,
    summary="Rotate an endpoint's secret",
    responses=documented(*OWN),
)
def rotate(svc: ServicesDep, key: SubmitKey, endpoint_id: EndpointId) -> Response:
    """A new secret. For a day each delivery carries two signatures, so that receivers can change over."""
    endpoint = find(svc, key, endpoint_id)
    until = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=OVERLAP_SECONDS)
    secret = _known(svc.endpoints.rotate(endpoint), endpoint_id)  # it may have been deleted since
    return json_response(SecretOut(secret=secret, previous_until=until))


@router.post(
    "/{endpoint_id}/test",
    status_code=202,
    response_model=DeliveryOut,
    summary="Send a test event",
    responses=documented(*OWN),
)
def test(svc: ServicesDep, key: SubmitKey, endpoint_id: EndpointId) -> Response:
    """Send a signed `webhook.test` event there, retried like any other; follow it in the delivery log."""
    return json_response(delivery_view(svc.outbox.ping(find(svc, key, endpoint_id))), 202)


@router.get(
    "/{endpoint_id}/deliveries",
    response_model=DeliveryPage,
    summary="List an endpoint's deliveries",
    responses=documented(*OWN),
)
def deliveries(
    svc: ServicesDep,
    key: ReadKey,
    endpoint_id: EndpointId,
    limit: Annotated[int, Query(ge=1, le=200, description="Deliveries at most.")] = 50,
) -> Response:
    """The delivery log: what was sent there and what it answered, latest first; the last 200 are kept."""
    find(svc, key, endpoint_id)
    found = svc.outbox.for_endpoint(endpoint_id, limit)
    return json_response(DeliveryPage(data=[delivery_view(item) for item in found]))


@router.post(
    "/{endpoint_id}/deliveries/{delivery_id}/redeliver",
    status_code=202,
    response_model=DeliveryOut,
    summary="Send one of an endpoint's deliveries again",
    responses=documented(*OWN),
)
def redeliver(svc: ServicesDep, key: SubmitKey, endpoint_id: EndpointId, delivery_id: DeliveryId) -> Response:
    """Send it again, with the same `webhook-id`; a waiting one goes out now."""
    find(svc, key, endpoint_id)
    delivery = svc.outbox.get(delivery_id)
    if delivery is None or delivery.endpoint != endpoint_id or not svc.outbox.redeliver(delivery_id):
        raise ProblemError(p.NOT_FOUND, f"No delivery {p.shorten(delivery_id)} of this endpoint.")
    return json_response(delivery_view(svc.outbox.get(delivery_id) or delivery), 202)

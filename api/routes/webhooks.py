"""``/v1/jobs/{id}/webhooks``: a job's deliveries, and sending one again."""

from datetime import UTC, datetime
from typing import Annotated

from fastapi import APIRouter, Path, Response

from api import problem as p
from api.auth import ReadKey, ServicesDep, SubmitKey
from api.problem import ProblemError, documented
from api.routes.jobs import OWN, JobId, find
from api.views import json_response, when
from api.webhook_schemas import DeliveryOut, DeliveryPage
from jobs.outbox import Delivery

router = APIRouter(prefix="/v1/jobs", tags=["webhooks"])
SHOWN = {"id", "job_id", "event", "state", "url", "attempts", "status", "data"}
DeliveryId = Annotated[str, Path(description="The delivery's id, `msg_...`.", max_length=200)]


def delivery_view(delivery: Delivery) -> DeliveryOut:
    """A delivery as clients see it."""
    return DeliveryOut(
        **delivery.model_dump(include=SHOWN),
        endpoint_id=delivery.endpoint,
        error=delivery.error or None,
        created_at=datetime.fromtimestamp(round(delivery.created_at, 3), UTC),
        next_attempt_at=when(delivery.next_at),
        ended_at=when(delivery.ended_at),
    )


@router.get(
    "/{job_id}/webhooks", response_model=DeliveryPage, summary="List deliveries", responses=documented(*OWN)
)
def deliveries(svc: ServicesDep, key: ReadKey, job_id: JobId) -> Response:
    """Every webhook of the job, in the order in which they are delivered."""
    find(svc, key, job_id)
    return json_response(DeliveryPage(data=[delivery_view(item) for item in svc.outbox.for_job(job_id)]))


@router.post(
    "/{job_id}/webhooks/{delivery_id}/redeliver",
    status_code=202,
    response_model=DeliveryOut,
    summary="Send a delivery again",
    responses=documented(*OWN),
)
def redeliver(svc: ServicesDep, key: SubmitKey, job_id: JobId, delivery_id: DeliveryId) -> Response:
    """Send a delivery again, with the same `webhook-id`; a waiting one goes out now."""
    find(svc, key, job_id)
    delivery = svc.outbox.get(delivery_id)
    if delivery is None or delivery.job_id != job_id or not svc.outbox.redeliver(delivery_id):
        raise ProblemError(p.NOT_FOUND, f"No delivery {p.shorten(delivery_id)} of this job.")
    return json_response(delivery_view(svc.outbox.get(delivery_id) or delivery), 202)

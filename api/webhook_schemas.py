"""What the API says of webhooks: deliveries, endpoints, and the payload itself. (The rest: `api.schemas`.)"""

from typing import Any, Literal

from pydantic import BaseModel, Field

from api.schemas import JOB_ID, ErrorOut, Timestamp
from jobs.job import JobState, Phase, WebhookEvent

ENDPOINT_ID = "we_0m7f3c2k9x1v5n8p4q6r7s2t1"


class DeliveryOut(BaseModel):
    """A webhook delivery: one event to one URL, over all its attempts."""

    id: str = Field(description="Also the `webhook-id` header, the same in every attempt.")
    event: str = Field(examples=["job.succeeded"])
    state: Literal["pending", "delivered", "dead"] = Field(
        description="`dead`: given up; redeliver it once the receiver works."
    )
    url: str = Field(examples=["https://example.com/hooks/reel"])
    job_id: str | None = Field(description="`null` for a test event.", examples=[JOB_ID])
    endpoint_id: str | None = Field(description="`null` when it goes to the job's own `callback_url`.")
    attempts: int = Field(description="Attempts since it was created or redelivered.", examples=[1])
    status: int | None = Field(description="The receiver's last HTTP status.", examples=[200])
    error: str | None = Field(description="Why the last attempt failed.", examples=["timed out after 15 s"])
    created_at: Timestamp
    next_attempt_at: Timestamp | None = Field(description="`null` when ended, or behind an earlier delivery.")
    ended_at: Timestamp | None
    data: dict[str, Any] = Field(description="The payload's `data`: the job when the event happened.")


class DeliveryPage(BaseModel):
    """A job's deliveries, oldest first; an endpoint's, latest first."""

    data: list[DeliveryOut]


class WebhookData(BaseModel):
    """The job when the event happened. Larger jobs come with the first five fields and `truncated`."""

    id: str = Field(examples=[JOB_ID])
    state: JobState
    model: str = Field(examples=["wan2.2-t2v-a14b"])
    attempts: int
    version: int = Field(description="Rises with every change of the job.", examples=[17])
    phase: Phase | None = None
    step: int | None = None
    progress: float | None = Field(None, examples=[0.35])
    eta_seconds: float | None = None
    cancel_requested: bool | None = None
    error: ErrorOut | None = None
    metadata: dict[str, str] | None = Field(None, examples=[{"ref": "order-1001"}])
    truncated: bool | None = None


class WebhookBody(BaseModel):
    """What a webhook posts about a job (Standard Webhooks)."""

    type: WebhookEvent
    timestamp: Timestamp = Field(description="When it happened.")
    data: WebhookData


class WebhookTestData(BaseModel):
    """Which endpoint a test was asked for, and that nothing has happened."""

    id: str = Field(examples=[ENDPOINT_ID])
    message: str = Field(examples=["This is a test. Nothing has happened to any job."])


class WebhookTestBody(BaseModel):
    """What `POST /v1/webhooks/{id}/test` posts: about an endpoint, not about a job."""

    type: Literal["webhook.test"]
    timestamp: Timestamp = Field(description="When it was asked for.")
    data: WebhookTestData


class EndpointOut(BaseModel):
    """A webhook endpoint: an address that hears of all jobs of its key."""

    id: str = Field(examples=[ENDPOINT_ID])
    url: str = Field(examples=["https://example.com/hooks/reel"])
    events: list[WebhookEvent] = Field(description="What it wants to hear of.")
    description: str = Field(examples=["orders"])
    enabled: bool = Field(description="`false`: it hears nothing, and keeps its secret.")
    gone: bool = Field(
        description="It answered 410: nothing is sent for a day, unless a test or a redelivery is asked for."
    )
    created_at: Timestamp


class EndpointCreated(EndpointOut):
    """A new endpoint with its secret, which is never shown again."""

    secret: str = Field(description="Verify signatures with it.", examples=["whsec_MfKQ9r8GKYqrTwjUPD8ILP"])


class EndpointList(BaseModel):
    """A key's endpoints, oldest first."""

    data: list[EndpointOut]


class SecretOut(BaseModel):
    """A new secret, shown this once; until `previous_until` the old one signs deliveries as well."""

    secret: str = Field(examples=["whsec_MfKQ9r8GKYqrTwjUPD8ILP"])
    previous_until: Timestamp

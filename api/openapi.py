"""The OpenAPI document: what FastAPI derives, plus the bodies that routes parse themselves."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from api.inputs import EndpointChange, EndpointIn, job_schema
from api.problem import OpenAIError, ProblemOut
from api.webhook_schemas import WebhookBody, WebhookTestBody
from jobs.job import WebhookEvent

DESCRIPTION = """
Videos from text and images with Wan 2.2.

1. `POST /v1/jobs` with a prompt; the answer (202) is a job.
2. Follow it: `GET /v1/jobs/{id}` (ETag, `Prefer: wait=30`), `GET /v1/jobs/{id}/events` (server-sent events),
   or a `callback_url` that receives signed webhooks.
3. `GET /v1/jobs/{id}/video` redirects to the MP4.

**Keys.** Every `/v1` route takes `Authorization: Bearer rk_...`. Scopes: `submit`, `read`, `admin`,
`priority_high`.

**Errors** are `application/problem+json` (RFC 9457). Compare `type`, which is stable; `errors` names every
wrong field with what came and what is allowed. Below `/v1/videos`, which speaks OpenAI's dialect, the same
problems come in its envelope.

**Limits.** `RateLimit` and `RateLimit-Policy` headers on every answer to a valid key; 429 and 503 carry
`Retry-After`.
"""
TAGS = [
    {"name": "jobs", "description": "Submit, follow, fetch."},
    {"name": "webhooks", "description": "Deliveries of a job's callbacks, and a key's own endpoints."},
    {"name": "uploads", "description": "Input images."},
    {"name": "service", "description": "Models, nodes, the key in use."},
    {"name": "openai", "description": "The same jobs in the shape of OpenAI's videos API."},
    {"name": "operations", "description": "Probes and metrics."},
]
ID_HEADER = {
    "X-Request-Id": {"description": "This request's id, also in our log.", "schema": {"type": "string"}},
}
KEYLESS = ("401", "431")  # answered before a key is known, whose limits could be told
RATE_HEADERS = {
    "RateLimit": {"description": 'Such as `"key";r=599;t=1`.', "schema": {"type": "string"}},
    "RateLimit-Policy": {"description": 'Such as `"key";q=600;w=60`.', "schema": {"type": "string"}},
}


def install_openapi(app: FastAPI) -> None:
    """Make ``app.openapi()`` build our document, once."""

    def build() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _build(app)
        return app.openapi_schema

    app.openapi = build  # type: ignore[method-assign]


def _build(app: FastAPI) -> dict[str, Any]:
    document = get_openapi(
        title=app.title, version=app.version, description=DESCRIPTION, routes=app.routes, tags=TAGS
    )
    schemas = document["components"]["schemas"]
    for name, schema in (
        ("JobIn", job_schema()),
        ("EndpointIn", EndpointIn.model_json_schema(ref_template="#/components/schemas/{model}")),
        ("EndpointChange", EndpointChange.model_json_schema(ref_template="#/components/schemas/{model}")),
        ("ProblemOut", ProblemOut.model_json_schema(ref_template="#/components/schemas/{model}")),
        ("WebhookBody", WebhookBody.model_json_schema(ref_template="#/components/schemas/{model}")),
        ("WebhookTestBody", WebhookTestBody.model_json_schema(ref_template="#/components/schemas/{model}")),
        ("OpenAIError", OpenAIError.model_json_schema(ref_template="#/components/schemas/{model}")),
    ):
        schemas.update(schema.pop("$defs", {}))
        schemas[name] = schema
    document["webhooks"] = _webhooks()
    for path, operations in document["paths"].items():
        for operation in operations.values():
            # FastAPI's own 422, a shape that we never send; below /v1/videos wrong parameters answer 400
            for status, response in list(operation["responses"].items()):
                schema = response.get("content", {}).get("application/json", {}).get("schema", {})
                if schema.get("$ref", "") != "#/components/schemas/HTTPValidationError":
                    continue
                if path.startswith("/v1/videos"):
                    del operation["responses"][status]
                else:
                    del response["content"]
            if operation.get("security"):
                for status, response in operation["responses"].items():
                    limits = {} if status in KEYLESS else RATE_HEADERS
                    response.setdefault("headers", {}).update({**ID_HEADER, **limits})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    return document


def _webhooks() -> dict[str, Any]:
    """What we post to clients, so that generated code knows the payload."""
    headers = [
        {"name": name, "in": "header", "required": True, "schema": {"type": "string"}, "description": words}
        for name, words in (
            ("webhook-id", "The same in every attempt: handle a delivery once."),
            ("webhook-timestamp", "Unix seconds of this attempt; refuse one older than five minutes."),
            ("webhook-signature", "Standard Webhooks: `v1,` and base64; two of them during a rotation."),
        )
    ]
    bodies = {event.value: "WebhookBody" for event in WebhookEvent} | {"webhook.test": "WebhookTestBody"}
    summaries = {event: f"A job's {event.removeprefix('job.')} event" for event in bodies}
    summaries["webhook.test"] = "A test that was asked for"
    return {
        event: {
            "post": {
                "summary": summaries[event],
                "parameters": headers,
                "requestBody": {
                    "required": True,
                    "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{body}"}}},
                },
                "responses": {
                    "2XX": {"description": "Taken. Anything else is tried again."},
                    "410": {"description": "Never again."},
                },
            }
        }
        for event, body in bodies.items()
    }

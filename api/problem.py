"""Errors as RFC 9457 problem+json: the types, the exception that routes raise, and how it is written.

Below ``/v1/videos`` the same problem is written in the OpenAI error envelope, which that client expects.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from jobs.errors import FieldProblem

PROBLEM_JSON = "application/problem+json"
OPENAI_PREFIX = "/v1/videos"


@dataclass(frozen=True)
class ProblemType:
    """One kind of error. `slug` is stable: clients may compare ``type`` with ``/problems/<slug>``."""

    slug: str
    status: int
    title: str
    advice: str  # what a client should do; shown at /problems/<slug>
    openai_type: str = "invalid_request_error"

    @property
    def uri(self) -> str:
        """The ``type`` member: a relative reference that this API also serves as a page."""
        return f"/problems/{self.slug}"


INVALID_REQUEST = ProblemType(
    "invalid-request", 422, "The request has fields that cannot be accepted",
    "Read `errors`: each entry names the field, what came and what is allowed. Nothing was queued.",
)  # fmt: skip
MALFORMED_JSON = ProblemType(
    "malformed-json", 400, "The body is not valid JSON",
    "Send one JSON object in UTF-8. `detail` says where the parser stopped.",
)  # fmt: skip
UNSUPPORTED_MEDIA_TYPE = ProblemType(
    "unsupported-media-type", 415, "The body's Content-Type is not accepted here",
    "Send the Content-Type that `errors` lists.",
)  # fmt: skip
BODY_TOO_LARGE = ProblemType(
    "body-too-large", 413, "The body is larger than this server accepts",
    "Send a smaller body; `errors` says the limit in bytes.",
)  # fmt: skip
BODY_TIMEOUT = ProblemType(
    "body-timeout", 408, "The body did not arrive in time", "Send the request again, without pauses.",
)  # fmt: skip
HEADERS_TOO_LARGE = ProblemType(
    "headers-too-large", 431, "The request's headers are larger than this server accepts",
    "Send fewer or shorter headers, and a shorter URL.",
)  # fmt: skip
UNAUTHENTICATED = ProblemType(
    "unauthenticated", 401, "A valid API key is needed",
    "Send `Authorization: Bearer rk_...`. Keys are made with `reel keys create`.", "authentication_error",
)  # fmt: skip
FORBIDDEN = ProblemType(
    "forbidden", 403, "The API key lacks a scope",
    "Use a key that has the scope which `errors` names.", "permission_error",
)  # fmt: skip
NOT_FOUND = ProblemType(
    "not-found", 404, "There is no such thing here",
    "Check the id and the path. What belongs to another key looks the same as what doesn't exist.",
)  # fmt: skip
METHOD_NOT_ALLOWED = ProblemType(
    "method-not-allowed", 405, "This path does not take that method",
    "Use one of the methods in the `Allow` header.",
)  # fmt: skip
WRONG_STATE = ProblemType(
    "wrong-state", 409, "The job's state does not allow that",
    "Read the job again and decide by its `state`.",
)  # fmt: skip
IDEMPOTENCY_CONFLICT = ProblemType(
    "idempotency-key-reused", 422, "The Idempotency-Key was used before with another body",
    "Use a new key for a new request; repeat the old body to get the old answer.",
)  # fmt: skip
RATE_LIMITED = ProblemType(
    "rate-limited", 429, "Too many requests with this key",
    "Wait for `Retry-After` seconds. `RateLimit` headers on every answer say what is left.",
    "rate_limit_error",
)  # fmt: skip
QUEUE_FULL = ProblemType(
    "queue-full", 429, "Too many jobs are waiting",
    "Wait for some of the outstanding jobs to end, or cancel them.", "rate_limit_error",
)  # fmt: skip
TOO_MANY = ProblemType(
    "too-many", 409, "There are as many of these as a key may have",
    "Delete one that is no longer needed.",
)  # fmt: skip
NO_MODEL = ProblemType(
    "no-model", 503, "No node serves a model yet",
    "Start a node, or try again after `Retry-After` seconds.", "server_error",
)  # fmt: skip
UNAVAILABLE = ProblemType(
    "unavailable", 503, "A service that this API needs cannot be reached",
    "Nothing was half-done. Try again after `Retry-After` seconds.", "server_error",
)  # fmt: skip
INTERNAL = ProblemType(
    "internal", 500, "Something went wrong on our side",
    "Try again; if it stays, give `request_id` to whoever runs this service.", "server_error",
)  # fmt: skip
BAD_REQUEST = ProblemType(
    "bad-request", 400, "The request cannot be understood",
    "Compare the request with the examples in /docs.",
)  # fmt: skip

TYPES: Mapping[str, ProblemType] = {
    kind.slug: kind for kind in list(globals().values()) if isinstance(kind, ProblemType)
}


@dataclass(eq=False)
class ProblemError(Exception):
    """Raised anywhere in a request to answer with a problem."""

    kind: ProblemType
    detail: str
    errors: Sequence[FieldProblem] = ()
    headers: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.kind.slug}: {self.detail}"


class FieldError(BaseModel):
    """One wrong field: what came, and what is allowed."""

    field: str = Field(description="Dotted path of the field, header or parameter.", examples=["frame_num"])
    got: str = Field(description="What came, shortened to 80 characters.", examples=["80"])
    expected: str = Field(description="What is allowed.", examples=["4n+1 from 1 to 121, such as 77 or 81"])


class ProblemOut(BaseModel):
    """An RFC 9457 problem."""

    type: str = Field(
        description="Stable kind of problem: compare with this, not with the texts.",
        examples=["/problems/invalid-request"],
    )
    title: str = Field(examples=[INVALID_REQUEST.title])
    status: int = Field(description="The HTTP status again.", examples=[422])
    detail: str = Field(
        description="What happened this time, for people.",
        examples=["1 field cannot be accepted: frame_num"],
    )
    instance: str = Field(description="The path that was asked for.", examples=["/v1/jobs"])
    request_id: str = Field(
        description="The same as the `X-Request-Id` header.", examples=["req_0m7f3c2k9x1v5n8p4q6r7s2t1"]
    )
    errors: list[FieldError] = Field(default_factory=list, description="Every wrong field at once.")


class OpenAIErrorBody(BaseModel):
    """The members that the `openai` package reads into its exceptions."""

    message: str = Field(examples=["size: got 1x1, expected one of 832x480, 480x832"])
    type: str = Field(examples=["invalid_request_error"])
    param: str | None = Field(description="The first wrong field.", examples=["size"])
    code: str = Field(description="Our problem type's slug.", examples=["invalid-request"])


class OpenAIError(BaseModel):
    """The OpenAI error envelope."""

    error: OpenAIErrorBody


def shorten(value: object, limit: int = 80) -> str:
    """`value` as text for an error, cut at `limit` characters."""
    text = value if isinstance(value, str) else repr(value)
    text = "".join(char if char.isprintable() else "\ufffd" for char in text[: limit + 1])
    return text if len(text) <= limit else text[: limit - 1] + "…"


def openai_message(problem: ProblemError) -> str:
    """The problem as the single sentence that the OpenAI client shows."""
    if not problem.errors:
        return problem.detail
    return "; ".join(f"{item.field}: got {item.got}, expected {item.expected}" for item in problem.errors)


def problem_response(request: Request, problem: ProblemError) -> JSONResponse:
    """Write `problem`: problem+json, or the OpenAI envelope below ``/v1/videos``."""
    path = request.url.path
    headers = {"Cache-Control": "no-store", **problem.headers}
    body: dict[str, Any]
    if path == OPENAI_PREFIX or path.startswith(OPENAI_PREFIX + "/"):
        param = problem.errors[0].field if problem.errors else None
        body = {
            "error": {
                "message": openai_message(problem),
                "type": problem.kind.openai_type,
                "param": param,
                "code": problem.kind.slug,
            }
        }
        return JSONResponse(body, openai_status(problem.kind), headers)
    body = {
        "type": problem.kind.uri,
        "title": problem.kind.title,
        "status": problem.kind.status,
        "detail": problem.detail,
        "instance": path,
        "request_id": getattr(request.state, "request_id", ""),
    }
    if problem.errors:
        body["errors"] = [vars(item) for item in problem.errors]
    return JSONResponse(body, problem.kind.status, headers, media_type=PROBLEM_JSON)


def openai_status(kind: ProblemType) -> int:
    """OpenAI answers a wrong parameter with 400 (its client then raises ``BadRequestError``)."""
    return 400 if kind is INVALID_REQUEST else kind.status


def documented(*kinds: ProblemType, openai: bool = False) -> dict[int | str, dict[str, Any]]:
    """The ``responses`` of a route that may answer with these problems, for the OpenAPI document."""
    by_status: dict[int, list[ProblemType]] = {}
    for kind in kinds:
        by_status.setdefault(openai_status(kind) if openai else kind.status, []).append(kind)
    schema = "#/components/schemas/" + ("OpenAIError" if openai else "ProblemOut")
    media = "application/json" if openai else PROBLEM_JSON
    return {
        status: {
            "description": "; or: ".join(f"`{kind.slug}`: {kind.title}. {kind.advice}" for kind in group),
            "content": {media: {"schema": {"$ref": schema}, "examples": _examples(group, openai)}},
        }
        for status, group in by_status.items()
    }


def _examples(kinds: Sequence[ProblemType], openai: bool) -> dict[str, Any]:
    """One example a kind."""
    if openai:
        return {
            kind.slug: {
                "value": {
                    "error": {
                        "message": kind.title,
                        "type": kind.openai_type,
                        "param": None,
                        "code": kind.slug,
                    }
                }
            }
            for kind in kinds
        }
    return {
        kind.slug: {
            "value": {
                "type": kind.uri,
                "title": kind.title,
                "status": kind.status,
                "detail": kind.advice,
                "instance": "/v1/jobs",
                "request_id": "req_0m7f3c2k9x1v5n8p4q6r7s2t1",
            }
        }
        for kind in kinds
    }

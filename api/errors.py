"""The one map from exceptions to problems."""

import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import redis.exceptions
import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from api import problem as p
from api.methods import allowed_methods
from api.problem import ProblemError, ProblemType, problem_response, shorten
from jobs import errors as e
from jobs.errors import FieldProblem

log = structlog.get_logger("api")
RETRY_SECONDS = 5  # what we ask of clients when a service is away


def invalid(problems: Sequence[FieldProblem]) -> ProblemError:
    """One 422 for all wrong fields."""
    names = ", ".join(dict.fromkeys(item.field for item in problems))
    count = len(problems)
    noun = "field" if count == 1 else "fields"
    return ProblemError(p.INVALID_REQUEST, f"{count} {noun} cannot be accepted: {names}", problems)


def _validation(error: RequestValidationError) -> ProblemError:
    """Parameters of the path, the query and the headers."""
    return invalid(
        [
            FieldProblem(
                ".".join(str(part) for part in item["loc"][1:]) or "request",
                shorten(item.get("input")),
                str(item["msg"]),
            )
            for item in error.errors()
        ]
    )


def _http(error: HTTPException) -> ProblemError:
    """Starlette's own errors: no such path, wrong method, and form parsing."""
    kinds = {404: p.NOT_FOUND, 405: p.METHOD_NOT_ALLOWED, 413: p.BODY_TOO_LARGE}
    kind = kinds.get(error.status_code, p.BAD_REQUEST)
    detail = "No such path; /docs lists them all." if kind is p.NOT_FOUND else str(error.detail)
    return ProblemError(kind, detail, headers=dict(error.headers or {}))


def _queue_full(error: e.QueueFull) -> ProblemError:
    return ProblemError(
        p.QUEUE_FULL, f"{str(error).capitalize()}.", headers={"Retry-After": str(RETRY_SECONDS * 2)}
    )


def unavailable(detail: str) -> ProblemError:
    """A 503 that says when to come back."""
    return ProblemError(p.UNAVAILABLE, detail, headers={"Retry-After": str(RETRY_SECONDS)})


def _store_away(error: Exception) -> ProblemError:
    log.warning("redis_unavailable", error=type(error).__name__)
    return unavailable("The queue (Redis) cannot be reached.")


def _storage_away(error: Exception) -> ProblemError:
    log.warning("storage_unavailable", error=type(error).__name__)
    return unavailable("The video storage (S3) cannot be reached.")


def _simple(kind: ProblemType) -> Callable[[Any], ProblemError]:
    return lambda error: ProblemError(kind, f"{str(error)[:1].upper()}{str(error)[1:]}.")


EXCEPTIONS: Mapping[type[Exception], Callable[[Any], ProblemError]] = {
    ProblemError: lambda error: error,
    RequestValidationError: _validation,
    HTTPException: _http,
    e.JobNotFound: _simple(p.NOT_FOUND),
    e.IllegalTransition: _simple(p.WRONG_STATE),
    e.IdempotencyConflict: _simple(p.IDEMPOTENCY_CONFLICT),
    e.QueueFull: _queue_full,
    e.InvalidRequest: lambda error: invalid(error.problems),
    e.StoreUnavailable: _store_away,
    redis.exceptions.RedisError: _store_away,
    e.StorageUnavailable: _storage_away,
}


def add_error_handlers(app: FastAPI) -> None:
    """Answer every exception of the map with its problem."""
    for kind, convert in EXCEPTIONS.items():

        def handle(
            request: Request, error: Exception, convert: Callable[[Any], ProblemError] = convert
        ) -> Response:
            problem = convert(error)
            if problem.kind is p.METHOD_NOT_ALLOWED:
                problem = replace(problem, headers={**problem.headers, "Allow": allowed_methods(request)})
            return problem_response(request, problem)

        app.add_exception_handler(kind, handle)


def internal_error(request: Request, error: Exception) -> Response:
    """The last resort: log where it happened, tell the client nothing but the request's id.

    The log has the exception's type and stack but not its text, which may quote a prompt or a secret.
    """
    frames = traceback.extract_tb(error.__traceback__)[-8:]
    log.error(
        "unexpected_error",
        error=type(error).__name__,
        # not `stack`, which structlog's console takes for a text
        frames=[f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames],
    )
    return problem_response(
        request, ProblemError(p.INTERNAL, "The error is in our log under this request_id.")
    )

"""Bearer keys: who asks, what the key may do, and how often."""

from collections.abc import Callable
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from api.problem import FORBIDDEN, RATE_LIMITED, UNAUTHENTICATED, ProblemError
from api.services import Services, services
from jobs.errors import FieldProblem
from jobs.keys import ApiKey, Scope

MAX_KEY_LENGTH = 200

bearer = HTTPBearer(
    scheme_name="ApiKey",
    bearerFormat="rk_...",
    description="An API key: `Authorization: Bearer rk_...`. `reel keys create` makes one and shows it once.",
    auto_error=False,
)
Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]
ServicesDep = Annotated[Services, Depends(services)]


def _refusal(detail: str) -> ProblemError:
    return ProblemError(
        UNAUTHENTICATED,
        detail,
        headers={"WWW-Authenticate": 'Bearer realm="reelserve", error="invalid_token"'},
    )


def authenticate(request: Request, credentials: Credentials, svc: ServicesDep) -> ApiKey:
    """The key that the request carries, counted against its rate limit.

    Raises ProblemError: unauthenticated, or rate-limited.
    """
    if credentials is None:
        raise _refusal("The request carries no API key.")
    plain = credentials.credentials
    key = svc.keys.authenticate(plain) if len(plain) <= MAX_KEY_LENGTH else None
    if key is None:
        raise _refusal("The API key is unknown or revoked.")
    request.state.key_id = key.id
    decision = svc.rate.take(key.id, key.requests_per_minute)
    request.state.rate_headers = decision.headers
    if not decision.allowed:
        raise ProblemError(
            RATE_LIMITED,
            f"This key may send {decision.limit} requests in {decision.window} seconds.",
            headers={"Retry-After": str(decision.retry_after)},
        )
    return key


Authenticated = Annotated[ApiKey, Depends(authenticate)]


def has_scope(key: ApiKey, scope: Scope) -> bool:
    """Whether the key has `scope`; admin includes reading and submitting, but not priority_high."""
    return scope in key.scopes or (scope in (Scope.READ, Scope.SUBMIT) and Scope.ADMIN in key.scopes)


def require(scope: Scope) -> Callable[[ApiKey], ApiKey]:
    """A dependency that gives the key, and refuses one without `scope`."""

    def check(key: Authenticated) -> ApiKey:
        if not has_scope(key, scope):
            got = ", ".join(sorted(key.scopes)) or "no scopes"
            raise ProblemError(
                FORBIDDEN,
                f"This key lacks the scope {scope.value!r}.",
                [FieldProblem("Authorization", f"a key with {got}", f"a key with {scope.value}")],
            )
        return key

    return check


SubmitKey = Annotated[ApiKey, Depends(require(Scope.SUBMIT))]
ReadKey = Annotated[ApiKey, Depends(require(Scope.READ))]
AdminKey = Annotated[ApiKey, Depends(require(Scope.ADMIN))]


def view_of(key: ApiKey) -> str:
    """The `key_id` whose jobs this key sees: its own, or all for an admin."""
    return "*" if Scope.ADMIN in key.scopes else key.id

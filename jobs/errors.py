"""Errors of the job contract, each with what came, what was expected and what to do."""

from dataclasses import dataclass


class JobsError(Exception):
    """Base of every error that this package raises on purpose."""


class LeaseLost(JobsError):
    """The caller's fencing token is stale: another node owns the job, or it has ended. Drop the work."""

    def __init__(self, job_id: str, token: int, reason: str) -> None:
        super().__init__(
            f"job {job_id}: token {token} no longer owns the lease ({reason}); drop this attempt"
        )
        self.job_id = job_id
        self.token = token
        self.reason = reason


class IllegalTransition(JobsError):
    """The job's state does not allow what was asked, such as canceling a finished job."""

    def __init__(self, job_id: str, state: str, wanted: str) -> None:
        super().__init__(f"job {job_id} is {state}: it cannot become {wanted}")
        self.job_id = job_id
        self.state = state
        self.wanted = wanted


class JobNotFound(JobsError):
    """No such job, or it belongs to another key (the two look the same on purpose)."""

    def __init__(self, job_id: str) -> None:
        super().__init__(f"no job {job_id}")
        self.job_id = job_id


class IdempotencyConflict(JobsError):
    """The Idempotency-Key was used before with another body."""

    def __init__(self, idempotency_key: str, job_id: str) -> None:
        super().__init__(
            f"Idempotency-Key {idempotency_key!r} came before with another body (job {job_id}); "
            "send the same body, or a new key"
        )


class QueueFull(JobsError):
    """A key's outstanding-job limit or the whole queue's limit is reached."""

    def __init__(self, limit: int, scope: str) -> None:
        super().__init__(f"{scope} already has {limit} outstanding jobs; wait for some to finish")
        self.limit = limit
        self.scope = scope


class StoreUnavailable(JobsError):
    """Redis cannot be reached or refuses writes. Safe to retry: nothing was half-written."""


class StorageUnavailable(JobsError):
    """S3 cannot be reached, refuses, or fails: the message says what was tried, where, and what to check."""


class StorageRefused(StorageUnavailable):
    """S3 understood and will not do it: no right to, or no such feature. Trying again changes nothing."""


@dataclass(frozen=True)
class FieldProblem:
    """One wrong request field.

    field: dotted path in the request body, such as ``guide_scale``.
    got: what came, shortened. expected: what would be accepted.
    """

    field: str
    got: str
    expected: str


class InvalidRequest(JobsError):
    """The request does not fit the model; carries every wrong field at once."""

    def __init__(self, problems: list[FieldProblem]) -> None:
        super().__init__("; ".join(f"{p.field}: got {p.got}, expected {p.expected}" for p in problems))
        self.problems = problems

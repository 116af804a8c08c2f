"""Size limits, enforced before anything parses a request: URL and headers, then the body as it arrives."""

import asyncio

from fastapi import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.problem import BODY_TIMEOUT, BODY_TOO_LARGE, HEADERS_TOO_LARGE, ProblemError, problem_response
from jobs.errors import FieldProblem

MAX_HEADER_BYTES = 16_384  # names and values together
MAX_TARGET_BYTES = 4_096  # path and query
UPLOAD_PATHS = frozenset({"/v1/uploads", "/v1/videos"})


class SizeLimits:
    """Refuses oversized requests with a problem, whether or not they announce their size.

    A body with ``Content-Length`` over the limit is refused unread; one without (chunked) is counted as it
    arrives and cut off at the limit, so no parser sees more. Each chunk must come within `chunk_seconds`.
    """

    def __init__(self, app: ASGIApp, max_body: int, max_upload: int, chunk_seconds: float = 30.0) -> None:
        self.app = app
        self.max_body = max_body
        self.max_upload = max_upload
        self.chunk_seconds = chunk_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check headers, then pass on a `receive` that counts."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limit = self.max_upload if scope["path"] in UPLOAD_PATHS else self.max_body
        started = False

        async def send_noting_start(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            self._check_head(scope, limit)
            await self.app(scope, self._counted(receive, limit), send_noting_start)
        except ProblemError as problem:
            if started:
                raise
            await problem_response(Request(scope), problem)(scope, receive, send)

    def _check_head(self, scope: Scope, limit: int) -> None:
        """Refuse by the request line and headers alone."""
        target = len(scope.get("raw_path") or scope["path"].encode()) + len(scope["query_string"])
        headers = sum(len(name) + len(value) for name, value in scope["headers"])
        for what, size, allowed in (
            ("URL", target, MAX_TARGET_BYTES),
            ("headers", headers, MAX_HEADER_BYTES),
        ):
            if size > allowed:
                raise ProblemError(
                    HEADERS_TOO_LARGE,
                    f"The {what} take {size} bytes, this server accepts {allowed}.",
                    [FieldProblem(what, f"{size} bytes", f"at most {allowed} bytes")],
                )
        for name, value in scope["headers"]:
            if name == b"content-length" and value.isdigit() and int(value) > limit:
                raise too_large(f"{int(value)} bytes", limit)

    def _counted(self, receive: Receive, limit: int) -> Receive:
        """`receive` that raises at the first byte past `limit`."""
        total = 0
        done = False

        async def counted() -> Message:
            nonlocal total, done
            if done:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), self.chunk_seconds)
            except TimeoutError:
                raise ProblemError(
                    BODY_TIMEOUT,
                    f"No part of the body came for {self.chunk_seconds:g} seconds.",
                    headers={"Connection": "close"},
                ) from None
            if message["type"] == "http.request":
                total += len(message.get("body", b""))
                done = not message.get("more_body", False)
                if total > limit:
                    raise too_large(f"more than {limit} bytes", limit)
            return message

        return counted


def too_large(got: str, limit: int) -> ProblemError:
    """The 413 that says how much came and how much is allowed."""
    return ProblemError(
        BODY_TOO_LARGE,
        f"The body has {got}, this server accepts {limit} bytes.",
        [FieldProblem("body", got, f"at most {limit} bytes")],
        # The rest of the body is still on its way: the connection can't carry another request.
        headers={"Connection": "close"},
    )

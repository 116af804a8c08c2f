"""The outermost layer of a request: its id, log line, metrics, and the headers that every answer carries."""

import re
import time

import structlog
from fastapi import Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.errors import internal_error
from api.metrics import Metrics
from jobs.ids import new_id

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{8,64}\Z")
log = structlog.get_logger("api")

SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
    # Answers of the API are data: nothing in them may ever run or load. The page sends its own policy.
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}


class RequestContext:
    """Gives each request an id, binds it to the logs, and logs one line at the end.

    The line has method, route template, status and time: never a query, header, body or concrete URL, since
    those may carry prompts and secrets.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the request inside its context."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if REQUEST_ID.match(given) else new_id("req")
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        started = time.perf_counter()
        status = 500
        answered = False

        async def send_with_headers(message: Message) -> None:
            nonlocal status, answered
            if message["type"] == "http.response.start":
                status, answered = message["status"], True
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
                for name, value in state.get("rate_headers", {}).items():
                    headers[name] = value
            await send(message)

        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request_id=request_id)
        try:
            await self.app(scope, receive, send_with_headers)
        except Exception as error:
            response = internal_error(Request(scope), error)
            if not answered:  # else the client sees the connection cut off
                await response(scope, receive, send_with_headers)
        finally:
            self._record(scope, status, time.perf_counter() - started)
            structlog.contextvars.clear_contextvars()

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "unmatched")
        self.metrics.request(scope["method"], route, status, seconds)
        if route in ("/healthz", "/readyz", "/metrics"):
            return
        log.info(
            "request",
            method=scope["method"],
            route=route,
            job_id=scope.get("path_params", {}).get("job_id"),
            key_id=scope["state"].get("key_id"),
            status=status,
            seconds=round(seconds, 4),
        )

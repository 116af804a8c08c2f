"""Which methods a path takes: the `Allow` of a 405, and HEAD wherever GET is taken."""

from starlette.requests import Request
from starlette.routing import Match
from starlette.types import ASGIApp, Receive, Scope, Send

STREAM = "/events"  # endless while a job lives: a HEAD would hold it open for nothing


def allowed_methods(request: Request) -> str:
    """The `Allow` header: the methods of all routes of this path. Each route alone knows only its own.

    The application keeps its routes in ``app.state.routes``.
    """
    path = request.scope["path"]
    found: set[str] = set()
    for route in request.app.state.routes:
        if route.matches(request.scope)[0] is not Match.NONE:
            found |= route.methods or set()
    if "GET" in found and not path.endswith(STREAM):
        found.add("HEAD")
    return ", ".join(sorted(found))


class HeadAsGet:
    """Answers HEAD with what GET would say (RFC 9110, 9.3.2); the server below leaves the body away.

    The outermost middleware: it hands on a copy of the scope, and the server goes on seeing HEAD. Logs and
    metrics count such a request as the GET that it is answered by.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass HEAD on as GET, everything else as it is."""
        if scope["type"] == "http" and scope["method"] == "HEAD" and not scope["path"].endswith(STREAM):
            scope = {**scope, "method": "GET"}
        await self.app(scope, receive, send)

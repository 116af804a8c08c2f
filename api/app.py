"""The app factory: services, middleware, error map and routes, put together."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from importlib.metadata import version

from fastapi import FastAPI

from api.context import RequestContext
from api.errors import add_error_handlers
from api.limits import SizeLimits
from api.methods import HeadAsGet
from api.metrics import Metrics
from api.openapi import install_openapi
from api.routes import endpoints, events, health, jobs, media, nodes, page, uploads, videos, webhooks
from api.services import open_services
from jobs.settings import Settings, get_settings

ROUTERS = (jobs, events, media, webhooks, endpoints, uploads, videos, nodes, health, page)


def create_app(settings: Settings | None = None) -> FastAPI:
    """The API for `settings` (None: from the environment). Nothing is connected before the first request.

    Raises ValueError when the secret key is missing.
    """
    settings = settings or get_settings()
    metrics = Metrics()
    services = open_services(settings, metrics)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        hub = asyncio.create_task(services.watcher.run())
        try:
            yield
        finally:
            services.stopping.set()
            services.watcher.wake_all()
            hub.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await hub
            await services.aredis.aclose()
            services.redis.close()

    app = FastAPI(
        title="reelserve",
        version=version("reelserve"),
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",
        redirect_slashes=False,  # such a redirect would lead wherever the Host header says
        lifespan=lifespan,
    )
    app.state.services = services
    app.state.routes = [*app.routes, *(route for module in ROUTERS for route in module.router.routes)]
    add_error_handlers(app)
    for module in ROUTERS:
        app.include_router(module.router)
    install_openapi(app)
    # The last one added is the outermost.
    app.add_middleware(SizeLimits, max_body=settings.max_body_bytes, max_upload=settings.max_upload_bytes)
    app.add_middleware(RequestContext, metrics=metrics)
    app.add_middleware(HeadAsGet)
    return app

"""What the routes work with: one `Services` per app, opened and closed by its lifespan."""

from dataclasses import dataclass, field
from threading import Event

from anyio import CapacityLimiter
from fastapi import Request

from api.metrics import Metrics
from api.rate import RateLimiter
from api.storage_check import StorageCheck
from api.watch import Watcher
from jobs.client import AsyncRedisClient, RedisClient, connect, connect_async
from jobs.endpoints import EndpointStore
from jobs.forecast import Forecast
from jobs.keys import KeyStore
from jobs.nodes import NodeRegistry
from jobs.outbox import Outbox
from jobs.settings import Settings
from jobs.storage import ObjectStore
from jobs.store import JobStore
from jobs.uploads import UploadIndex

UPLOADS_AT_ONCE = 8


@dataclass(frozen=True)
class Services:
    """Clients and stores that live as long as the app."""

    settings: Settings
    redis: RedisClient
    aredis: AsyncRedisClient
    jobs: JobStore
    keys: KeyStore
    endpoints: EndpointStore
    nodes: NodeRegistry
    forecast: Forecast
    outbox: Outbox
    storage: ObjectStore
    quick_storage: ObjectStore  # for what need not succeed
    storage_check: StorageCheck
    uploads: UploadIndex
    rate: RateLimiter
    metrics: Metrics
    watcher: Watcher
    # Uploads wait for each other, so that an S3 that hangs keeps few of the server's threads.
    uploading: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(UPLOADS_AT_ONCE))
    stopping: Event = field(default_factory=Event)  # set at SIGTERM: streams end, waits return


def live_seconds(settings: Settings) -> float:
    """A node unheard of for longer is no longer live."""
    return 2 * settings.lease_seconds


def secret_text(settings: Settings) -> str:
    """The key that hashes API keys and encrypts webhook secrets. Raises ValueError when it is not set."""
    if settings.secret_key is None:
        raise ValueError("REEL_SECRET_KEY is not set: give this role a random value of 32 bytes or more")
    return settings.secret_key.get_secret_value()


def open_services(settings: Settings, metrics: Metrics) -> Services:
    """Build all clients. Connects to nothing yet: a Redis that is away shows in /readyz and as 503."""
    client, aclient = connect(settings), connect_async(settings)
    quick = ObjectStore(settings, quick=True)
    jobs, nodes = JobStore(client, settings), NodeRegistry(client)
    return Services(
        settings=settings,
        redis=client,
        aredis=aclient,
        jobs=jobs,
        keys=KeyStore(client, secret_text(settings)),
        endpoints=EndpointStore(client, settings, secret_text(settings)),
        nodes=nodes,
        forecast=Forecast(jobs, nodes),
        outbox=Outbox(client, settings),
        storage=ObjectStore(settings),
        quick_storage=quick,
        storage_check=StorageCheck(quick.ready, settings.s3_bucket),
        uploads=UploadIndex(client, settings),
        rate=RateLimiter(client, settings),
        metrics=metrics,
        watcher=Watcher(aclient),
    )


def services(request: Request) -> Services:
    """The app's services, as a dependency."""
    found = request.app.state.services
    assert isinstance(found, Services)
    return found

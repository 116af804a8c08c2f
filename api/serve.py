"""``reel api``: waits for what the API needs, then serves until told to stop."""

import os
import signal
import sys
from types import FrameType

import uvicorn

from api.app import create_app
from api.services import Services
from jobs.log import setup_logging
from jobs.settings import Settings
from jobs.startup import Missing, redis_missing, storage_missing, wait_for

GRACE_SECONDS = 15  # for answers that are still being sent after SIGTERM


class Server(uvicorn.Server):
    """uvicorn that ends event streams and waits as soon as it is told to stop, not after its grace."""

    def __init__(self, config: uvicorn.Config, services: Services) -> None:
        super().__init__(config)
        self._services = services

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Note the signal, and wake everything that only waits."""
        self._services.stopping.set()
        self._services.watcher.wake_all()
        super().handle_exit(sig, frame)


def run(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT. Exits with 1 and one line on stderr when a dependency is missing."""
    try:
        if settings.secret_key is None:
            raise Missing("REEL_SECRET_KEY is not set; give the API a random value of 32 characters or more")
        wait_for(settings, "api", redis_missing, storage_missing)
    except Missing as missing:
        print(f"reel api: {missing}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None
    setup_logging("api", settings.log_level)
    app = create_app(settings)
    config = uvicorn.Config(
        app,
        host=settings.api_host,
        port=settings.api_port,
        log_config=None,
        access_log=False,  # our own line has the request id and no query
        server_header=False,
        timeout_graceful_shutdown=GRACE_SECONDS,
        timeout_keep_alive=30,
        h11_max_incomplete_event_size=32_768,
        forwarded_allow_ips=os.environ.get("REEL_FORWARDED_ALLOW_IPS", "127.0.0.1"),
    )
    Server(config, app.state.services).run()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    run(Settings())

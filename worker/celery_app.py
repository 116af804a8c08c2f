"""Celery, for the short and repeatable work: webhooks and sweeps.

Losing a message must not matter, for Celery over Redis can lose one (a worker that dies within a second of
the fetch). So messages carry no truth: the outbox says which deliveries are due, and a sweep looks at the
store itself. Beat asks every second; what was lost is found at the next look. Messages don't name deliveries:
each says "send what is due", so that their number is bounded by the senders, whatever the backlog.
"""

import logging
import random
import ssl
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from threading import Semaphore
from typing import Any
from urllib.parse import urlsplit

from celery import Celery
from celery.beat import EmbeddedService
from celery.exceptions import SecurityWarning

from jobs.client import connect
from jobs.endpoints import EndpointStore
from jobs.keys import KeyStore
from jobs.log import setup_logging
from jobs.outbox import Outbox
from jobs.settings import Settings
from jobs.storage import ObjectStore
from jobs.store import JobStore
from jobs.uploads import UploadIndex
from worker.sweeper import remove_files, sweep
from worker.webhooks import WebhookSender, signing_secrets

PREFIX = "reel:celery:"  # of every Redis key that Celery makes
VISIBILITY_SECONDS = 120  # an unacknowledged message comes back after this; above any task's time
DISPATCH_SECONDS = 1.0  # how often due deliveries are looked for
DELIVER_SECONDS = 30.0  # how long one message's sender goes on before it makes room for another task
CLEAN_SECONDS = 60.0
# Of messages, by the sender's clock, read by another machine's: clocks may be minutes off.
EXPIRE_SECONDS = 600.0
THREADS = 16
SENDERS = 13  # of them deliver at once, so that hanging receivers (15 s each) can't keep the sweep waiting
LOOK = 64  # due deliveries that a sender chooses from; senders that all took the first would collide
QUEUE = "reel"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Services:
    """What the tasks work with; made at first use, shared by the threads of a worker."""

    settings: Settings

    @cached_property
    def redis(self) -> Any:
        """The client for everything below."""
        return connect(self.settings)

    @cached_property
    def outbox(self) -> Outbox:
        """The webhook deliveries."""
        return Outbox(self.redis, self.settings)

    @cached_property
    def sender(self) -> WebhookSender:
        """The webhook sender; only here is the secret key needed."""
        assert self.settings.secret_key is not None, "checked at start"
        keys = KeyStore(self.redis, self.settings.secret_key)
        endpoints = EndpointStore(self.redis, self.settings, self.settings.secret_key)
        return WebhookSender(self.outbox, signing_secrets(keys, endpoints), settings=self.settings)

    @cached_property
    def store(self) -> JobStore:
        """The jobs."""
        return JobStore(self.redis, self.settings)

    @cached_property
    def storage(self) -> ObjectStore:
        """The bucket."""
        return ObjectStore(self.settings)

    @cached_property
    def uploads(self) -> UploadIndex:
        """The input images."""
        return UploadIndex(self.redis, self.settings)


def make_app(settings: Settings) -> Celery:
    """The Celery application with its four tasks."""
    app = Celery("reel", broker=broker_url(settings.redis_url), set_as_current=False)
    app.conf.update(configuration(settings))
    services = Services(settings)

    senders, sweeping, cleaning = Semaphore(SENDERS), Semaphore(1), Semaphore(1)

    @app.task(name="reel.dispatch", shared=False)
    def dispatch() -> int:
        """Have as many senders work as there are due deliveries, if so many aren't on their way already."""
        if services.redis.llen(f"{PREFIX}{QUEUE}") >= SENDERS:
            return 0
        wanted = len(services.outbox.due(SENDERS))
        for _ in range(wanted):
            deliver.apply_async(expires=EXPIRE_SECONDS)
        return wanted

    @app.task(name="reel.deliver", shared=False)
    def deliver() -> int:
        """Send due deliveries one after the other, also what their end makes due; how many attempts."""
        return bounded(senders, lambda: send_due(services.outbox, services.sender))

    @app.task(name="reel.sweep", shared=False)
    def sweep_jobs() -> int:
        """See worker.sweeper.sweep."""
        return bounded(sweeping, lambda: sweep(services.store))

    @app.task(name="reel.clean", shared=False)
    def clean() -> int:
        """See worker.sweeper.remove_files."""
        return bounded(cleaning, lambda: remove_files(services.store, services.storage, services.uploads))

    return app


def bounded(threads: Semaphore, work: Callable[[], int]) -> int:
    """Do the work, unless enough of this worker's threads are at it: else one kind takes them all. Then 0."""
    if not threads.acquire(blocking=False):
        return 0
    try:
        return work()
    finally:
        threads.release()


def send_due(outbox: Outbox, sender: WebhookSender) -> int:
    """Attempt what is due until nothing is, or for DELIVER_SECONDS; how many attempts were made."""
    end, made = time.monotonic() + DELIVER_SECONDS, 0
    while time.monotonic() < end and (due := outbox.due(LOOK)):
        random.shuffle(due)
        # The first that nobody else took; when all were taken, others do the work.
        if not any(sender.send(one) for one in due):
            break
        made += 1
    return made


def configuration(settings: Settings) -> dict[str, Any]:
    """Every Celery setting that we depend on, in one place."""
    transport = {
        "visibility_timeout": VISIBILITY_SECONDS,
        "global_keyprefix": PREFIX,
        "queue_order_strategy": "round_robin",
    }
    conf: dict[str, Any] = {
        # JSON alone: a pickle put into Redis is refused unread
        "task_serializer": "json",
        "result_serializer": "json",
        "accept_content": ["json"],
        "result_accept_content": ["json"],
        "task_ignore_result": True,
        "task_store_errors_even_if_ignored": False,
        "task_acks_late": True,
        "task_reject_on_worker_lost": True,
        "worker_prefetch_multiplier": 1,
        "worker_pool": "threads",
        "worker_concurrency": THREADS,
        # Celery reads the timeout from three places, depending on the code path
        "broker_transport_options": transport,
        "result_backend_transport_options": transport,
        "visibility_timeout": VISIBILITY_SECONDS,
        "task_default_queue": QUEUE,
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,
        "worker_cancel_long_running_tasks_on_connection_loss": True,
        "worker_hijack_root_logger": False,
        "worker_redirect_stdouts": False,
        "worker_enable_remote_control": False,
        "worker_send_task_events": False,
        "worker_soft_shutdown_timeout": 20.0,
        "task_soft_time_limit": None,
        "timezone": "UTC",
        "beat_scheduler": "celery.beat:Scheduler",  # in memory: nothing to lose, no file
        "beat_max_loop_interval": 1.0,
        "beat_schedule": schedule(settings),
    }
    if settings.redis_url.startswith("rediss://"):
        conf["broker_use_ssl"] = {"ssl_cert_reqs": ssl.CERT_REQUIRED}
    return conf


def schedule(settings: Settings) -> dict[str, dict[str, Any]]:
    """Beat's schedule. An old message is of no use, as the next one is there, but does no harm either."""
    periods = {
        "reel.dispatch": DISPATCH_SECONDS,
        "reel.sweep": settings.sweep_seconds,
        "reel.clean": min(CLEAN_SECONDS, max(settings.retention_seconds / 10, 1.0)),
    }
    return {
        name: {"task": name, "schedule": seconds, "options": {"expires": EXPIRE_SECONDS}}
        for name, seconds in periods.items()
    }


def broker_url(redis_url: str) -> str:
    """The settings' Redis URL in kombu's spelling: unix sockets are `redis+socket://path?virtual_host=db`."""
    if not redis_url.startswith("unix://"):
        return redis_url
    parts = urlsplit(redis_url)
    auth = f"{parts.netloc}" if parts.netloc else ""
    return f"redis+socket://{auth}{parts.path}" + (
        f"?{parts.query.replace('db=', 'virtual_host=')}" if parts.query else ""
    )


def serve(settings: Settings, role: str) -> int:
    """Run a worker, beat, or both in one process, until SIGTERM or SIGINT; the exit code."""
    app = make_app(settings)
    quieten()
    if role == "beat":
        app.Beat(loglevel=settings.log_level).run()
        return 0
    beat: Any = EmbeddedService(app, thread=True) if role == "all" else None
    if beat is not None:
        beat.start()
    worker = app.Worker(
        pool="threads",
        concurrency=THREADS,
        loglevel=settings.log_level,
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
        quiet=True,
    )
    setup_logging("celery", settings.log_level)  # again: Celery has put its own handlers in
    worker.start()
    if beat is not None:
        beat.stop()
    return int(worker.exitcode or 0)


def quieten() -> None:
    """No line per task (there is one a second), and no warning about root: messages are JSON, never code."""
    warnings.filterwarnings("ignore", category=SecurityWarning)
    for name in ("celery.beat", "celery.worker.strategy", "celery.app.trace"):
        logging.getLogger(name).setLevel(logging.WARNING)

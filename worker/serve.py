"""The worker roles' entry points, for the command line: `run_node` and `run_celery`."""

import logging
import os
import secrets
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path

from jobs.log import setup_logging
from jobs.settings import Settings
from jobs.startup import Missing, made_bucket_missing, redis_missing, storage_missing, wait_for
from worker.plan import NodePlan, ranks_and_device, threads_per_rank

BUCKET_SECONDS = 5.0  # between two looks for a bucket that could not be made in the time to start
log = logging.getLogger(__name__)


def run_node(settings: Settings, model_path: Path, name: str | None = None) -> int:
    """Serve the checkpoint at `model_path` until drained by SIGTERM or `reel drain`; the exit code.

    One line on stderr and 1 when Redis, S3 or the checkpoint can't be used.
    """
    from worker.supervisor import Supervisor

    setup_logging("node", settings.log_level)
    try:
        wait_for(settings, "node", redis_missing, storage_missing)
        plan = make_plan(settings, model_path, name)
    except (Missing, ValueError, OSError) as error:
        return _refuse("node", error)
    return Supervisor(plan).run()


def run_celery(settings: Settings, role: str = "all") -> int:
    """Run Celery's "worker", "beat", or "all" (both in one process) until a signal; the exit code."""
    from worker.celery_app import serve

    setup_logging("celery", settings.log_level)
    try:
        if role not in ("worker", "beat", "all"):
            raise ValueError(f"role {role!r} is unknown; use worker, beat or all")
        if settings.secret_key is None and role != "beat":
            raise ValueError("webhooks can't be signed without REEL_SECRET_KEY (the API's own); set it")
        wait_for(settings, "celery", redis_missing)
    except (Missing, ValueError) as error:
        return _refuse("celery", error)
    if role != "beat":  # beside serving, for webhooks need no bucket
        threading.Thread(target=prepare_bucket, args=(settings,), name="bucket", daemon=True).start()
    return serve(settings, role)


def prepare_bucket(settings: Settings) -> None:
    """Make the bucket that API and nodes wait for, and set its CORS rules, however long S3 stays away."""
    try:
        wait_for(settings, "celery", made_bucket_missing)
    except Missing as missing:
        log.warning("the bucket can't be made now, looking on: %s", missing)
        while made_bucket_missing(settings):
            time.sleep(BUCKET_SECONDS)
        log.info("the bucket is there now")


def make_plan(settings: Settings, model_path: Path, name: str | None) -> NodePlan:
    """What is fixed for this node's life. Raises ValueError if the settings don't fit the machine."""
    ranks, device = ranks_and_device(settings.node_ranks)
    node_id = settings.node_id or f"{socket.gethostname()}-{secrets.token_hex(3)}"
    run_dir = Path(tempfile.mkdtemp(prefix="reel-"))  # /tmp/reel-xxxxxxxx: socket paths end at 107 characters
    plan = NodePlan(
        settings=settings.model_copy(update={"secret_key": None, "node_id": node_id}),
        model=model_path.resolve(),
        name=name,
        node_id=node_id,
        ranks=ranks,
        device=device,
        threads=threads_per_rank(ranks),
        run_dir=run_dir,
        work_dir=(settings.data_dir / "work" / node_id).resolve(),
    )
    os.mkfifo(plan.log_pipe, 0o600)
    return plan


def _refuse(role: str, error: Exception) -> int:
    print(f"reel {role}: {error}", file=sys.stderr, flush=True)
    return 1

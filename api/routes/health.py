"""``/healthz``, ``/readyz`` and ``/metrics``: for probes and scrapers, without a key."""

import secrets
import time

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from api import problem as p
from api.auth import ServicesDep
from api.checks import NotReadyError, check
from api.problem import UNAUTHENTICATED, ProblemError, documented
from api.routes.nodes import live_models, node_views
from api.schemas import Health, Ready
from api.services import Services
from api.views import json_response
from jobs.errors import StoreUnavailable

router = APIRouter(tags=["operations"])


@router.get("/healthz", response_model=Health, summary="Is the process alive?")
async def healthz() -> Health:
    """Answers as long as the process can; touches nothing else."""
    return Health()


@router.get(
    "/readyz",
    response_model=Ready,
    summary="Would a job run?",
    responses={503: {"model": Ready, "description": "Not now; `missing` says why not."}},
)
def readyz(svc: ServicesDep) -> Response:
    """Asks Redis, the storage, and whether a live node serves a model."""
    checks = {
        "redis": check(lambda: _redis(svc)),
        "s3": svc.storage_check.look(),
        "node": check(lambda: _node(svc)),
    }
    missing = [name for name, found in checks.items() if not found.ok]
    body = Ready(ready=not missing, missing=missing, checks=checks)
    return json_response(body, 503 if missing else 200, {"Retry-After": "2"} if missing else {})


def _redis(svc: Services) -> str:
    started = time.perf_counter()
    svc.redis.ping()
    return f"answered in {(time.perf_counter() - started) * 1000:.0f} ms"


def _node(svc: Services) -> str:
    live = live_models(svc)
    if not live:
        raise NotReadyError("no live node serves a model; start one with `reel node --model PATH`")
    return ", ".join(sorted(live))


@router.get(
    "/metrics",
    summary="Prometheus metrics",
    response_class=Response,
    responses={
        200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Exposition format."},
        **documented(p.UNAUTHENTICATED),
    },
)
def metrics(request: Request, svc: ServicesDep) -> Response:
    """Requests, jobs, queue and nodes. Needs a bearer token only where `REEL_METRICS_TOKEN` is set."""
    token = svc.settings.metrics_token
    sent = request.headers.get("authorization", "").removeprefix("Bearer ")
    if token and not secrets.compare_digest(sent.encode(), token.get_secret_value().encode()):
        raise ProblemError(UNAUTHENTICATED, "The metrics of this server need its metrics token.")
    _observe(svc)
    return Response(svc.metrics.render(), media_type=CONTENT_TYPE_LATEST)


def _observe(svc: Services) -> None:
    """Set the queue's gauges; a Redis that is away shows as `reel_store_up 0`, not as a failed scrape."""
    m = svc.metrics
    m.storage_up.set(svc.storage_check.look().ok)
    for gauge in (m.jobs, m.oldest, m.nodes):
        gauge.clear()
    try:
        for row in svc.jobs.queue_stats():
            m.jobs.labels(row.model, row.priority, "queued").set(row.waiting)
            m.jobs.labels(row.model, row.priority, "running").set(row.running)
            m.oldest.labels(row.model, row.priority).set(row.oldest_seconds or 0)
        for node in node_views(svc):
            m.nodes.labels(node.state if node.live else "lost").inc()
        m.store_up.set(1)
    except StoreUnavailable:
        m.store_up.set(0)

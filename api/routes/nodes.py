"""``/v1/models``, ``/v1/nodes`` and ``/v1/key``: what there is to work with."""

from datetime import UTC, datetime

from fastapi import APIRouter

from api import problem as p
from api.auth import AdminKey, Authenticated, ReadKey, ServicesDep
from api.preset_views import preset_views
from api.problem import documented
from api.routes.jobs import COMMON
from api.schemas import KeyOut, ModelList, ModelOut, NodeList, NodeOut
from api.services import Services, live_seconds
from jobs.client import guard
from jobs.job import ModelCard

router = APIRouter(prefix="/v1", tags=["service"])


def node_views(svc: Services) -> list[NodeOut]:
    """All nodes that reported lately. Live: heard of within two leases' time, by the Redis clock."""
    with guard():
        now = float(svc.redis.execute_command("TIME")[0])
    found = svc.nodes.list()
    running = svc.jobs.many([node.job_id for node in found if node.job_id])
    progress = {job.id: round(job.progress, 4) for job in running}
    return [
        NodeOut(
            **node.model_dump(
                include={
                    "id", "state", "model", "ranks", "layout", "host", "device", "version", "job_id",
                    "publishing_job_id", "labels", "memory_used", "memory_total", "step_seconds",
                }
            ),
            live=node.state != "stopped" and now - node.seen_at <= live_seconds(svc.settings),
            progress=progress.get(node.job_id or ""),
            draining=node.drain_requested or node.state == "draining",
            started_at=datetime.fromtimestamp(round(node.started_at, 3), UTC),
            seen_at=datetime.fromtimestamp(round(node.seen_at, 3), UTC),
        )
        for node in found
    ]  # fmt: skip


def live_models(svc: Services) -> frozenset[str]:
    """Models that a live node serves and whose card is known."""
    return svc.nodes.live_models(live_seconds(svc.settings))


def model_view(svc: Services, card: ModelCard, live: bool) -> ModelOut:
    """A model card as clients see it."""
    return ModelOut(
        id=card.name,
        task=card.task,
        live=live,
        sizes=card.sizes,
        fps=card.fps,
        max_frame_num=card.max_frame_num,
        max_sampling_steps=card.max_sampling_steps,
        sample_solvers=card.sample_solvers,
        loras=card.loras,
        presets=preset_views(svc, card),
        defaults={
            "size": card.default_size,
            "frame_num": card.default_frame_num,
            "shift": card.default_shift,
            "sampling_steps": card.default_sampling_steps,
            "guide_scale": list(card.default_guide_scale),
            "sample_solver": card.sample_solvers[0],
        },
    )


@router.get("/models", response_model=ModelList, summary="List models", responses=documented(*COMMON))
def models(svc: ServicesDep, key: ReadKey) -> ModelList:
    """Every model that a node has announced, with its sizes, limits and defaults."""
    live = live_models(svc)
    return ModelList(data=[model_view(svc, card, card.name in live) for card in svc.nodes.models()])


@router.get("/nodes", response_model=NodeList, summary="List nodes", responses=documented(*COMMON))
def nodes(svc: ServicesDep, key: AdminKey) -> NodeList:
    """Every node that reported within the last minute. Needs the scope admin."""
    return NodeList(data=node_views(svc))


@router.get(
    "/key",
    response_model=KeyOut,
    summary="Read the key in use",
    responses=documented(p.UNAUTHENTICATED, p.RATE_LIMITED, p.UNAVAILABLE, p.HEADERS_TOO_LARGE),
)
def current_key(key: Authenticated) -> KeyOut:
    """Which key this request carries and what it may do: a cheap way to check one."""
    return KeyOut(id=key.id, name=key.name, scopes=sorted(key.scopes))

"""Jobs, nodes and the queue as rows of text, for the tables that operators see."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jobs.job import Job
    from jobs.keys import ApiKey
    from jobs.nodes import NodeInfo
    from jobs.queries import QueueStats

JOB_COLUMNS = ("id", "state", "progress", "age", "model", "key", "node", "why")
NODE_COLUMNS = ("id", "state", "model", "ranks", "device", "gpus", "memory", "job", "heard", "drain")
MODEL_COLUMNS = ("name", "task", "nodes")
KEY_COLUMNS = ("id", "name", "scopes", "outstanding", "requests a minute", "created", "revoked")
QUEUE_COLUMNS = ("model", "priority", "waiting", "running", "oldest")


def job_rows(found: "Sequence[Job]", now: float) -> list[list[str]]:
    """JOB_COLUMNS of each job. now: Unix seconds."""
    return [
        [
            job.id,
            job.state.value,
            f"{job.progress:.0%}",
            f"{now - job.created_at:.0f} s",
            job.request.model,
            job.key_id,
            job.owner or "",
            job.error.detail if job.error else "",
        ]
        for job in found
    ]


def node_rows(found: "Sequence[NodeInfo]", now: float) -> list[list[str]]:
    """NODE_COLUMNS of each node: GPUs by the mean of their load and the fullest memory. now: Unix seconds."""
    return [
        [
            node.id,
            node.state,
            node.model,
            str(node.ranks),
            node.device,
            f"{sum(gpu.busy for gpu in node.gpus) / len(node.gpus):.0%}" if node.gpus else "",
            f"{max(gpu.memory_used / gpu.memory_total for gpu in node.gpus):.0%}" if node.gpus else "",
            node.job_id or "",
            f"{max(0.0, now - node.seen_at):.0f} s ago",
            "asked" if node.drain_requested else "",
        ]
        for node in found
    ]


def queue_rows(stats: "Sequence[QueueStats]") -> list[list[str]]:
    """QUEUE_COLUMNS of each model and priority that has jobs."""
    return [
        [
            row.model,
            row.priority.value,
            str(row.waiting),
            str(row.running),
            "" if row.oldest_seconds is None else f"{row.oldest_seconds:.0f} s",
        ]
        for row in stats
        if row.waiting or row.running
    ]


def key_rows(found: "Sequence[ApiKey]") -> list[list[str]]:
    """API keys as `reel keys list` shows them."""
    return [
        [
            key.id,
            key.name,
            " ".join(sorted(key.scopes)),
            _limit(key.max_outstanding),
            _limit(key.requests_per_minute),
            _moment(key.created_at),
            _moment(key.revoked_at),
        ]
        for key in found
    ]


def _limit(value: int | None) -> str:
    return "the default" if value is None else f"{value:,}"


def _moment(at: float | None) -> str:
    """A Unix time to the minute; nothing for none."""
    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M} UTC" if at else ""

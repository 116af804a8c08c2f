"""`reel exporter`: what happened to jobs and nodes, for Prometheus, read from Redis.

Nodes pull from any cloud and nothing can reach them, so they can't be scraped. What they report is in the
jobs' records: each job that ended since the last look is counted once, in the order of ending (the retention
index). Run exactly one. Counters start at zero with the process, as Prometheus expects.
"""

import json
import threading
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import Counter, Gauge, Histogram

from infra.scaler.observe import gpu_seconds
from jobs.client import connect, guard
from jobs.errors import JobNotFound, StoreUnavailable
from jobs.job import Job, JobState
from jobs.nodes import NodeRegistry
from jobs.scripts import PREFIX
from jobs.settings import Settings
from jobs.store import JobStore

LOOK_SECONDS = 5.0
BATCH = 500  # ended jobs counted in one look; the rest come with the next
LONG = (1, 5, 15, 30, 60, 90, 120, 180, 300, 600, 1200, 2400, 4800, 9600)
SHORT = (0.05, 0.1, 0.25, 0.5, 1, 2, 3, 5, 10, 30, 60)


class JobMetrics:
    """The families, on a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        by_model, by_priority = ["model"], ["model", "priority"]
        self.finished = Counter(
            "reel_jobs_finished_total", "Jobs that ended.", [*by_priority, "state"], registry=registry
        )
        self.wait = Histogram(
            "reel_job_wait_seconds",
            "From submit to the last start.",
            by_priority,
            buckets=LONG,
            registry=registry,
        )
        self.total = Histogram(
            "reel_job_total_seconds", "From submit to success.", by_priority, buckets=LONG, registry=registry
        )
        self.phase = Histogram(
            "reel_job_phase_seconds",
            "Wall seconds by phase.",
            ["model", "phase"],
            buckets=LONG,
            registry=registry,
        )
        self.step = Histogram(
            "reel_step_seconds",
            "Denoising seconds a step.",
            ["model", "size"],
            buckets=SHORT,
            registry=registry,
        )
        self.gap = Histogram(
            "reel_node_idle_gap_seconds",
            "From free GPUs to the next claim on a node, while a job was waiting.",
            by_model,
            buckets=SHORT,
            registry=registry,
        )
        self.node_seconds = Counter(
            "reel_job_node_seconds_total",
            "Seconds that ended jobs held a node's GPUs.",
            by_model,
            registry=registry,
        )
        self.failures = Counter(
            "reel_attempts_failed_total",
            "Failed attempts of ended jobs, by the error's type (lease-lost: the node died).",
            ["model", "type"],
            registry=registry,
        )
        self._gauges(registry)

    def _gauges(self, registry: CollectorRegistry) -> None:
        self.dead = Gauge("reel_dead_letters", "Jobs in the dead letter.", registry=registry)
        self.hooks = Gauge(
            "reel_webhooks",
            "Jobs with a webhook due or waiting, and webhooks given up.",
            ["state"],
            registry=registry,
        )
        self.late = Gauge(
            "reel_webhook_late_seconds", "How long the next webhook is overdue.", registry=registry
        )
        self.nodes = Gauge(
            "reel_model_nodes", "Nodes by model and state.", ["model", "state"], registry=registry
        )
        self.memory = Gauge("reel_redis_memory_bytes", "Memory that Redis uses.", registry=registry)
        self.limit = Gauge("reel_redis_memory_limit_bytes", "Its maxmemory; 0: none.", registry=registry)
        self.saved = Gauge(
            "reel_redis_persistence_ok", "1 when the last AOF write and rewrite went well.", registry=registry
        )
        self.looked = Gauge(
            "reel_exporter_look_timestamp_seconds", "The last look, Unix time.", registry=registry
        )


class Exporter:
    """Looks at Redis and keeps the metrics up to date."""

    def __init__(self, settings: Settings) -> None:
        self.metrics = JobMetrics()
        self._settings = settings
        self._redis = connect(settings)
        self._store = JobStore(self._redis, settings)
        self._nodes = NodeRegistry(self._redis)
        self._since: tuple[float, str] | None = None  # end and id of the last job that was counted
        self._free: dict[str, float] = {}  # node to the time its GPUs were free
        self._shown: set[tuple[str, str]] = set()

    def look(self) -> None:
        """Count what ended since the last look; show what is now. Raises StoreUnavailable."""
        with guard():
            whole, micros = self._redis.execute_command("TIME")
        now = int(whole) + int(micros) / 1e6
        if self._since is None:
            self._since = (now, "")
        for job_id, ended in self._ended():
            try:
                self._count(self._store.get(job_id))
            except JobNotFound:  # deleted between the two reads
                continue
            finally:
                self._since = (ended, job_id)
        self._show(now)
        self.metrics.looked.set(now)

    def _ended(self) -> list[tuple[str, float]]:
        """Jobs that ended after the cursor, first things first."""
        assert self._since is not None
        kept = self._settings.retention_seconds
        last, last_id = self._since
        with guard():
            flat = self._redis.execute_command(
                "ZRANGEBYSCORE", f"{PREFIX}retention", f"{last + kept - 1e-6:.6f}", "+inf", "WITHSCORES",
                "LIMIT", 0, BATCH,
            )  # fmt: skip
        rows = [(str(name), float(score) - kept) for name, score in _pairs(flat)]
        return [row for row in rows if (round(row[1], 6), row[0]) > (round(last, 6), last_id)]

    def _count(self, job: Job) -> None:
        metrics, model, priority = self.metrics, job.request.model, job.priority.value
        metrics.finished.labels(model, priority, job.state.value).inc()
        if job.started_at is not None:
            metrics.wait.labels(model, priority).observe(max(0.0, job.started_at - job.created_at))
        if job.attempts:
            for kind in self._failed_attempts(job):
                metrics.failures.labels(model, kind).inc()
        if job.state is not JobState.SUCCEEDED or job.result is None:
            return
        if job.finished_at is not None:
            metrics.total.labels(model, priority).observe(job.finished_at - job.created_at)
        for phase, seconds in job.result.seconds.items():
            metrics.phase.labels(model, phase).observe(seconds)
        if denoising := job.result.seconds.get("denoising"):
            metrics.step.labels(model, job.request.size).observe(denoising / job.request.sampling_steps)
        self._count_node(job)

    def _count_node(self, job: Job) -> None:
        seconds = gpu_seconds(job)
        if seconds is None or job.started_at is None or job.owner is None:
            return
        model = job.request.model
        self.metrics.node_seconds.labels(model).inc(seconds)
        free = self._free.get(job.owner)
        if free is not None and job.queued_at <= free <= job.started_at:
            self.metrics.gap.labels(model).observe(job.started_at - free)
        self._free[job.owner] = job.started_at + seconds

    def _failed_attempts(self, job: Job) -> list[str]:
        """The error types of attempts that were charged, from the job's events and its final error."""
        with guard():
            entries = self._redis.execute_command("XRANGE", f"{PREFIX}events:{job.id}", "-", "+")
        kinds = []
        for _, fields in entries:
            pairs = fields if isinstance(fields, dict) else dict(zip(fields[::2], fields[1::2], strict=True))
            reason = json.loads(pairs["data"]).get("reason")
            if isinstance(reason, dict):
                kinds.append(str(reason.get("type", "unknown")))
        if job.error is not None:
            kinds.append(job.error.type)
        return kinds

    def _show(self, now: float) -> None:
        metrics = self.metrics
        with guard():
            pipe = self._redis.pipeline(transaction=False)
            for command in (("ZCARD", "dead"), ("ZCARD", "outbox"), ("ZCARD", "outbox:dead")):
                pipe.execute_command(command[0], PREFIX + command[1])
            pipe.execute_command("ZRANGE", f"{PREFIX}outbox", 0, 0, "WITHSCORES")
            dead, pending, given_up, head = pipe.execute()
            info: dict[str, Any] = self._redis.execute_command("INFO")
        metrics.dead.set(dead)
        metrics.hooks.labels("pending").set(pending)
        metrics.hooks.labels("dead").set(given_up)
        due = [float(score) for _, score in _pairs(head)]
        metrics.late.set(max(0.0, now - due[0]) if due else 0.0)
        metrics.memory.set(info["used_memory"])
        metrics.limit.set(info.get("maxmemory", 0))
        states = ("aof_last_write_status", "aof_last_bgrewrite_status")
        metrics.saved.set(
            int(bool(info.get("aof_enabled")) and all(info.get(s, "ok") == "ok" for s in states))
        )
        self._show_nodes()

    def _show_nodes(self) -> None:
        counts = dict.fromkeys(self._shown, 0)
        nodes = self._nodes.list()
        for node in nodes:
            key = (node.model, str(node.state))
            counts[key] = counts.get(key, 0) + 1
        for key, count in counts.items():
            self.metrics.nodes.labels(*key).set(count)
        self._shown = set(counts)
        self._free = {name: at for name, at in self._free.items() if name in {node.id for node in nodes}}


def _pairs(reply: Any) -> list[tuple[str, float]]:
    """Members and scores, as whichever protocol the client speaks replies them."""
    if reply and isinstance(reply[0], list | tuple):
        return [(member, float(score)) for member, score in reply]
    return [(member, float(score)) for member, score in zip(reply[::2], reply[1::2], strict=True)]


def run(settings: Settings, port: int) -> int:
    """Serve /metrics on `port`, look every LOOK_SECONDS, until the process is told to end; the exit code."""
    exporter = Exporter(settings)
    exporter.look()  # a Redis that is away at the start is an error; later it only shows in the metrics
    start_http_server(port, registry=exporter.metrics.registry)
    print(f"exporter: /metrics on port {port}", flush=True)
    pause = threading.Event()
    while True:
        pause.wait(LOOK_SECONDS)
        try:
            exporter.look()
        except StoreUnavailable as error:
            print(f"exporter: {error}", flush=True)

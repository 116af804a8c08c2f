"""`reel exporter`: what happened to jobs and nodes, for Prometheus, read from Redis.

Nodes pull from any cloud and nothing can reach them, so they can't be scraped. What they report is in the
jobs' records: each job that ended since the last look is counted once, in the order of ending (the retention
index). Run exactly one. Counters start at zero with the process, as Prometheus expects.
"""

import json
import threading
from collections.abc import Iterable
from typing import Any

from prometheus_client import start_http_server

from infra.errors import CliError
from infra.prometheus.families import JobMetrics
from infra.scaler.observe import gpu_seconds
from jobs.client import connect, guard, redis_now
from jobs.errors import JobNotFound, StoreUnavailable
from jobs.job import Job, JobState, Phase
from jobs.nodes import NodeInfo, NodeRegistry
from jobs.records import pairs
from jobs.scripts import PREFIX
from jobs.settings import Settings
from jobs.store import JobStore

LOOK_SECONDS = 5.0
BATCH = 500  # ended jobs counted in one look; the rest come with the next


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
        self._first = True
        self._outcomes: dict[str, int] = {}  # webhook attempts by outcome, as counted so far
        self._gpus: set[tuple[str, str, str]] = set()

    def look(self) -> None:
        """Count what ended since the last look; show what is now. Raises StoreUnavailable."""
        with guard():
            now = redis_now(self._redis)
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
        last_failed = job.state is JobState.FAILED and job.attempts > 0
        metrics.retries.labels(model).inc(job.attempts - last_failed)
        if job.attempts:
            for kind in self._failed_attempts(job):
                metrics.failures.labels(model, kind).inc()
        if job.state is not JobState.SUCCEEDED or job.result is None:
            return
        if job.finished_at is not None:
            metrics.total.labels(model, priority).observe(job.finished_at - job.created_at)
        for phase, seconds in job.result.seconds.items():
            metrics.phase.labels(model, phase).observe(seconds)
        metrics.bytes.labels(model).inc(job.result.bytes)
        if upload := job.result.seconds.get(Phase.PUBLISHING):
            metrics.upload.labels(model).observe(upload)
        if job.result.gpu_seconds is not None:
            metrics.gpu_seconds.labels(model, job.result.device).inc(job.result.gpu_seconds)
        if job.result.cost is not None:
            metrics.cost.labels(model, job.result.device).inc(job.result.cost)
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
        kinds: list[str] = []
        before = ""
        for _, fields in entries:
            pairs = fields if isinstance(fields, dict) else dict(zip(fields[::2], fields[1::2], strict=True))
            if before == "job.failed":  # replayed since: what came before was counted at that end
                kinds.clear()
            before = pairs["type"]
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
            pipe.execute_command("HGETALL", f"{PREFIX}outcomes")
            dead, pending, given_up, head, outcomes = pipe.execute()
            info: dict[str, Any] = self._redis.execute_command("INFO")
        metrics.dead.set(dead)
        metrics.hooks.labels("pending").set(pending)
        metrics.hooks.labels("dead").set(given_up)
        due = [float(score) for _, score in _pairs(head)]
        metrics.late.set(max(0.0, now - due[0]) if due else 0.0)
        self._count_outcomes({name: int(count) for name, count in pairs(outcomes).items()})
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
        self._show_gpus(nodes)
        self._free = {name: at for name, at in self._free.items() if name in {node.id for node in nodes}}

    def _show_gpus(self, nodes: Iterable[NodeInfo]) -> None:
        metrics, shown = self.metrics, set()
        for node in nodes:
            for gpu in node.gpus:
                labels = (node.model, node.id, str(gpu.index))
                shown.add(labels)
                metrics.gpu_busy.labels(*labels).set(gpu.busy)
                metrics.gpu_memory.labels(*labels).set(gpu.memory_used)
                metrics.gpu_total.labels(*labels).set(gpu.memory_total)
        for labels in self._gpus - shown:  # a node that left would show its last load for ever
            for family in (metrics.gpu_busy, metrics.gpu_memory, metrics.gpu_total):
                family.remove(*labels)
        self._gpus = shown

    def _count_outcomes(self, totals: dict[str, int]) -> None:
        """Redis counts for ever; ours begins with the process, as all counters do."""
        for name, total in totals.items():
            new = total - self._outcomes.get(name, total if self._first else 0)
            self.metrics.outcomes.labels(name).inc(max(0, new))
        self._outcomes, self._first = totals, False


def _pairs(reply: Any) -> list[tuple[str, float]]:
    """Members and scores, as whichever protocol the client speaks replies them."""
    if reply and isinstance(reply[0], list | tuple):
        return [(member, float(score)) for member, score in reply]
    return [(member, float(score)) for member, score in zip(reply[::2], reply[1::2], strict=True)]


def run(settings: Settings, port: int) -> int:
    """Serve /metrics on `port`, look every LOOK_SECONDS, until the process is told to end; the exit code."""
    exporter = Exporter(settings)
    exporter.look()  # a Redis that is away at the start is an error; later it only shows in the metrics
    try:
        start_http_server(port, registry=exporter.metrics.registry)
    except OSError as error:
        raise CliError(f"--port: got {port} ({error.strerror}), expected a free one") from None
    print(f"exporter: /metrics on port {port}", flush=True)
    pause = threading.Event()
    while True:
        pause.wait(LOOK_SECONDS)
        try:
            exporter.look()
        except StoreUnavailable as error:
            print(f"exporter: {error}", flush=True)

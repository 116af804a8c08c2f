"""The metric families of `reel exporter`, by Prometheus' naming conventions.

https://prometheus.io/docs/practices/naming/
"""

from collections.abc import Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.core import Counter, Gauge, Histogram

LONG = (1, 5, 15, 30, 60, 90, 120, 180, 300, 600, 1200, 2400, 4800, 9600)
SHORT = (0.05, 0.1, 0.25, 0.5, 1, 2, 3, 5, 10, 30, 60)


class JobMetrics:
    """The families, on a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._jobs()
        self._spending()
        self._nodes()
        self._webhooks()
        self._redis()

    def _jobs(self) -> None:
        model, priority = ["model"], ["model", "priority"]
        self.finished = self._counter("jobs_finished", "Jobs that ended.", [*priority, "state"])
        self.wait = self._histogram("job_wait_seconds", "From submit to the last start.", priority, LONG)
        self.total = self._histogram("job_total_seconds", "From submit to success.", priority, LONG)
        self.phase = self._histogram("job_phase_seconds", "Wall seconds by phase.", ["model", "phase"], LONG)
        self.step = self._histogram("step_seconds", "Denoising seconds a step.", ["model", "size"], SHORT)
        self.upload = self._histogram("upload_seconds", "MP4, poster and manifest to S3.", model, SHORT)
        self.bytes = self._counter("video_bytes", "Bytes of finished MP4s.", model)
        self.retries = self._counter(
            "job_retries", "Attempts of ended jobs, but their last, that failed or lost their node.", model
        )
        self.failures = self._counter(
            "attempts_failed",
            "Failed attempts of ended jobs, by the error's type (lease-lost: the node died).",
            ["model", "type"],
        )
        self.dead = self._gauge("dead_letters", "Jobs in the dead letter.")

    def _spending(self) -> None:
        self.node_seconds = self._counter(
            "job_node_seconds", "Seconds that ended jobs held a node's GPUs.", ["model"]
        )
        self.gpu_seconds = self._counter(
            "job_gpu_seconds", "GPUs times the seconds that finished videos held them.", ["model", "device"]
        )
        self.cost = self._counter("job_cost", "Their price, on nodes that have one.", ["model", "device"])

    def _nodes(self) -> None:
        self.nodes = self._gauge("model_nodes", "Nodes by model and state.", ["model", "state"])
        self.gap = self._histogram(
            "node_idle_gap_seconds",
            "From free GPUs to the next claim on a node, while a job was waiting.",
            ["model"],
            SHORT,
        )
        gpu = ["model", "node", "gpu"]
        self.gpu_busy = self._gauge("gpu_busy_ratio", "Share of time in which a kernel ran, 0 to 1.", gpu)
        self.gpu_memory = self._gauge("gpu_memory_bytes", "Memory in use on a GPU.", gpu)
        self.gpu_total = self._gauge("gpu_memory_total_bytes", "Memory that the GPU has.", gpu)

    def _webhooks(self) -> None:
        self.hooks = self._gauge(
            "webhooks", "Jobs with a webhook due or waiting, and webhooks given up.", ["state"]
        )
        self.late = self._gauge("webhook_late_seconds", "How long the next webhook is overdue.")
        self.outcomes = self._counter(
            "webhook_attempts",
            "Webhook posts by outcome: delivered, retry (will be tried again), dead, gone (410).",
            ["outcome"],
        )

    def _redis(self) -> None:
        self.memory = self._gauge("redis_memory_bytes", "Memory that Redis uses.")
        self.limit = self._gauge("redis_memory_limit_bytes", "Its maxmemory; 0: none.")
        self.saved = self._gauge("redis_persistence_ok", "1 when the last AOF write and rewrite went well.")
        self.looked = self._gauge("exporter_look_timestamp_seconds", "The last look, Unix time.")

    def _counter(self, name: str, text: str, labels: Sequence[str] = ()) -> Counter:
        return Counter(f"reel_{name}_total", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, labels: Sequence[str] = ()) -> Gauge:
        return Gauge(f"reel_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, labels: Sequence[str], buckets: Sequence[float]) -> Histogram:
        return Histogram(f"reel_{name}", text, labels, buckets=buckets, registry=self.registry)

"""Prometheus metrics of the API process, and of the queue at the moment of asking."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """One registry per app, so that two apps in a process (tests) don't share counters."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "reel_http_requests_total",
            "Requests answered, by method, route template and status.",
            ["method", "route", "status"],
            registry=self.registry,
        )
        self._seconds = Histogram(
            "reel_http_request_seconds",
            "Seconds from the request's head to the end of its answer.",
            ["method", "route"],
            buckets=BUCKETS,
            registry=self.registry,
        )
        self.submitted = Counter(
            "reel_jobs_submitted_total",
            "Jobs accepted, by model and priority (replays of an Idempotency-Key not counted).",
            ["model", "priority"],
            registry=self.registry,
        )
        self.streams = Gauge("reel_event_streams", "Open event streams.", registry=self.registry)
        self.jobs = Gauge(
            "reel_jobs",
            "Jobs in the queue now, by model, priority and state.",
            ["model", "priority", "state"],
            registry=self.registry,
        )
        self.oldest = Gauge(
            "reel_queue_oldest_seconds",
            "Age of the longest waiting job, by model and priority.",
            ["model", "priority"],
            registry=self.registry,
        )
        self.nodes = Gauge("reel_nodes", "Nodes by state.", ["state"], registry=self.registry)
        self.store_up = Gauge("reel_store_up", "1 when Redis answered this scrape.", registry=self.registry)
        self.storage_up = Gauge("reel_storage_up", "1 when S3 answered lately.", registry=self.registry)

    def request(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count one answered request."""
        method = method if method in {"GET", "POST", "DELETE", "HEAD", "OPTIONS", "PUT", "PATCH"} else "OTHER"
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(method, route).observe(seconds)

    def render(self) -> bytes:
        """The exposition text."""
        return generate_latest(self.registry)

"""What the scaler says of itself to Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

from infra.scaler.policy import MachineState
from infra.scaler.reconcile import Pass


class ScalerMetrics:
    """One registry a process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._gauges: list[Gauge] = []
        self._desired = self._gauge("desired_nodes", "Nodes wanted by load alone.")
        self._target = self._gauge("target_nodes", "Nodes wanted within the limits.")
        self._machines = self._gauge("machines", "Machines by state.", "state")
        self._price = self._gauge("price_per_hour", "What the managed machines cost.")
        self._job = self._gauge("job_seconds", "Seconds a job that the formula used.")
        self._failing = self._gauge("failed_orders", "Orders in a row that brought no node.")
        self._at = self._gauge("pass_timestamp_seconds", "When the last pass succeeded, Unix time.")
        self._ordered = self._counter("ordered", "Machines ordered.")
        self._drained = self._counter("drained", "Nodes asked to drain.")
        self._removed = self._counter("removed", "Machines removed.")
        self._errors = self._counter("errors", "Passes that could not be made, by model (queue: all).")

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        gauge = Gauge(f"reel_scaler_{name}", text, ["model", *labels], registry=self.registry)
        self._gauges.append(gauge)
        return gauge

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"reel_scaler_{name}_total", text, ["model"], registry=self.registry)

    def serve(self, port: int) -> None:
        """Answer /metrics on `port`, all interfaces, from a thread of its own."""
        start_http_server(port, registry=self.registry)

    def passed(self, done: Pass) -> None:
        """Count one pass."""
        model, decision, machines = done.model, done.decision, done.seen.machines
        self._desired.labels(model).set(decision.desired)
        self._target.labels(model).set(decision.target)
        for state in MachineState:
            self._machines.labels(model, state.value).set(sum(m.state is state for m in machines))
        self._price.labels(model).set(sum(m.price for m in machines if m.managed))
        if done.seen.job_seconds is not None:
            self._job.labels(model).set(done.seen.job_seconds)
        self._failing.labels(model).set(decision.memory.failed_orders)
        self._ordered.labels(model).inc(decision.add)
        self._drained.labels(model).inc(len(decision.drain))
        self._removed.labels(model).inc(len(decision.remove))
        self._at.labels(model).set(done.seen.now)

    def stood_down(self) -> None:
        """Another scaler leads: what this one saw is no longer so."""
        for gauge in self._gauges:
            gauge.clear()

    def failed(self, what: str) -> None:
        """Count a pass that could not be made."""
        self._errors.labels(what).inc()

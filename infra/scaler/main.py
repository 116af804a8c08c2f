"""`reel scaler`: the loop around the passes. Any number may run; one leads, the rest stand by."""

import logging
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from infra.scaler.config import ConfigError, ScalerConfig, load, make_driver
from infra.scaler.driver import DriverError
from infra.scaler.drivers.local import LocalNodes
from infra.scaler.memory import Leadership, LeadLost, RedisMemory
from infra.scaler.metrics import ScalerMetrics
from infra.scaler.observe import QueueSource
from infra.scaler.reconcile import Pass, Pool
from jobs.client import connect
from jobs.errors import StoreUnavailable
from jobs.nodes import NodeRegistry
from jobs.settings import Settings
from jobs.store import JobStore

LEAD_SECONDS = 60.0  # at least; until a dead leader is followed. A pass that takes longer renews it
log = logging.getLogger(__name__)
Say = Callable[[str], None]


def run(
    settings: Settings,
    config: Path,
    *,
    dry_run: bool = False,
    once: bool = False,
    metrics_port: int | None = None,
    say: Say | None = None,
) -> int:
    """Scale until SIGTERM or SIGINT, or for one pass (`once`, and always with `dry_run`). The exit code.

    dry_run: print what would be done and why; needs no lead, writes nothing. metrics_port: serve /metrics
    there. Raises ConfigError before anything is done.
    """
    plan = load(config)
    client = connect(settings)
    source = QueueSource(JobStore(client, settings), NodeRegistry(client))
    lead = Leadership(client, max(LEAD_SECONDS, 4 * plan.interval))
    memory = RedisMemory(client, lead)
    local: list[LocalNodes] = []
    pools = [Pool(pool.model, pool.policy, make_driver(pool, local), source, memory) for pool in plan.pools]
    say = say or (lambda line: print(line, flush=True))
    if dry_run:
        for pool in pools:
            report(pool.step(dry_run=True), say)
        return 0
    metrics = ScalerMetrics()
    if metrics_port is not None:
        _serve(metrics, metrics_port)
    try:
        return Loop(plan, pools, lead, metrics, say).run(once)
    finally:
        for nodes in local:
            nodes.stop_all()


def _serve(metrics: ScalerMetrics, port: int) -> None:
    try:
        metrics.serve(port)
    except OSError as error:
        raise ConfigError(f"--metrics-port: got {port} ({error.strerror}), expected a free one") from None


class Loop:
    """Passes at the interval while it leads. A pass that fails is said and tried again; nothing else stops
    it.
    """

    def __init__(
        self, plan: ScalerConfig, pools: list[Pool], lead: Leadership, metrics: ScalerMetrics, say: Say
    ) -> None:
        self._plan = plan
        self._pools = pools
        self._lead = lead
        self._metrics = metrics
        self._say = say
        self._stop = threading.Event()
        self._said: dict[str, object] = {}  # by model: the last decision that was told

    def run(self, once: bool) -> int:
        """Until a signal, or one pass."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        self._say(f"scaler: {len(self._pools)} pools, a pass every {self._plan.interval:g} s")
        leading = True
        while not self._stop.is_set():
            start = time.monotonic()
            try:
                leads = self._lead.hold()
                if leads != leading and not leads:
                    self._say("scaler: another one leads; standing by")
                    self._metrics.stood_down()
                leading = leads
                if leads:
                    self.one_pass()
            except StoreUnavailable as error:
                self._say(f"scaler: {error}")
                self._metrics.failed("queue")
            if once:
                break
            self._stop.wait(max(0.0, self._plan.interval - (time.monotonic() - start)))
        try:
            self._lead.leave()
        except StoreUnavailable:
            log.warning("Redis is away: the lead ends by its time limit")
        return 0

    def one_pass(self) -> None:
        """Every pool once; one pool's broken cloud does not keep the others from theirs."""
        for pool in self._pools:
            if self._stop.is_set() or not self._lead.hold():
                return
            try:
                with self._lead.kept():
                    done = pool.step()
            except LeadLost as error:
                self._say(f"scaler: {error}")
                return
            except (DriverError, ValueError) as error:  # ValueError: its memory can't be read
                self._say(f"scaler: {pool.model}: {error}")
                self._metrics.failed(pool.model)
                continue
            self._metrics.passed(done)
            decision = done.decision
            news = (decision.capacity, decision.target, decision.add, decision.drain, decision.remove)
            if news != self._said.get(pool.model):  # not at every pass: its figures always change a little
                report(done, self._say)
                self._said[pool.model] = news

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._stop.set()


def report(done: Pass, say: Say) -> None:
    """One pass for people: a line of figures, then the reasons."""
    decision = done.decision
    say(f"{done.model}: {decision.capacity} nodes, {decision.desired} desired, target {decision.target}")
    for line in done.done:
        say(f"  {line}")

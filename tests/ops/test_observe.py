"""What the scaler takes a machine for, and what it tells Prometheus of a pass."""

from typing import Any

import pytest

from infra.scaler.driver import Health, Rented
from infra.scaler.drivers.skypilot import _rented
from infra.scaler.metrics import ScalerMetrics
from infra.scaler.observe import look
from infra.scaler.policy import Machine, MachineState, Memory, Policy, Seen, decide
from infra.scaler.reconcile import Pass
from jobs.nodes import NodeInfo


def test_metrics_say_what_a_pass_saw_and_did() -> None:
    machines = (
        Machine("a", MachineState.SERVING, price=20.0),
        Machine("b", MachineState.DRAINED, price=30.0),
        Machine("fixed", MachineState.SERVING, price=99.0, managed=False),
    )
    sight = Seen(1000.0, waiting=90, running=0, job_seconds=12.5, machines=machines)
    policy = Policy(target_wait=10, max_nodes=4)
    decision = decide(policy, sight, Memory(failed_orders=3))
    metrics = ScalerMetrics()
    metrics.passed(Pass("tiny", sight, decision, ()))
    get, tiny = metrics.registry.get_sample_value, {"model": "tiny"}
    seen = {
        name: get(f"reel_scaler_{name}", tiny) for name in ("desired_nodes", "target_nodes", "job_seconds")
    }
    assert seen == {"desired_nodes": 113, "target_nodes": 4, "job_seconds": 12.5}
    assert get("reel_scaler_price_per_hour", tiny) == 50, "only what this scaler rents"
    states = {state: get("reel_scaler_machines", {**tiny, "state": state}) for state in MachineState}
    assert {state: count for state, count in states.items() if count} == {"serving": 2, "drained": 1}
    assert get("reel_scaler_failed_orders", tiny) == decision.memory.failed_orders
    assert get("reel_scaler_pass_timestamp_seconds", tiny) == 1000
    counted = [get(f"reel_scaler_{name}_total", tiny) for name in ("ordered", "drained", "removed")]
    assert counted == [decision.add, 0, 1]
    assert decision.add > 0


@pytest.mark.parametrize(
    ("health", "node", "asked", "state"),
    [
        (Health.PENDING, None, False, "starting"),
        (Health.UP, "starting", False, "starting"),
        (Health.UP, "idle", False, "serving"),
        (Health.UP, "busy", True, "draining"),
        (Health.UP, "draining", False, "draining"),
        (Health.UP, "stopped", False, "drained"),
        (Health.LOST, None, False, "gone"),
        (Health.LOST, "busy", False, "gone"),
        (Health.LOST, "draining", False, "draining"),
    ],
)
def test_what_a_machine_is(health: Health, node: Any, asked: bool, state: str) -> None:
    """By its cloud and its node's report; an operator's drain counts like the scaler's own."""
    nodes = [NodeInfo(id="m", model="tiny", state=node, drain_requested=asked)] if node else []
    (machine,) = look(0.0, (0, 0, None), nodes, [Rented("m", health)], Memory(), 7.0).machines
    assert (machine.state, machine.price) == (state, 7.0)
    (fixed,) = look(0.0, (0, 0, None), nodes, [], Memory()).machines if nodes else (None,)
    leaving = asked or node in ("draining", "stopped")
    assert fixed is None or (fixed.managed, fixed.state) == (False, "draining" if leaving else "serving")


def test_a_cluster_that_sky_calls_unhealthy_is_lost() -> None:
    """Its status is INIT as for one that boots, and it would be waited for, and paid, for nothing."""
    item = {"name": "m", "status": "INIT", "launched_at": 100, "init_kind": "unhealthy"}
    assert _rented(item).health is Health.LOST
    assert _rented({**item, "init_kind": None}).health is Health.PENDING

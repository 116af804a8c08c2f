"""The capacity formula: by hand, on a small measurement, and as docs/operations.md states it."""

import json
from pathlib import Path

import pytest

from benchmarks import capacity
from benchmarks.capacity import Cost, Measured, measure, plan, tables

DOCS = Path(__file__).resolve().parents[2] / "docs"
NAMES = ("submit", "claim", "heartbeat", "node beat", "read", "finish")


def test_the_formula_by_hand() -> None:
    """100 nodes of 50 s: 2 jobs a second; (1 + 1 + 1 + 10) x 2 + (2 + 1) x 100 = 326 calls a second."""
    found = Measured("x", 1, {name: Cost(1000, 100, 10) for name in NAMES}, waiting=1e3, ended=1e4)
    made = plan(found, 100, 50.0, days=1.0, video=4e6)
    assert made.jobs_a_day == 172_800
    assert made.core == pytest.approx(0.326 / 0.7)
    assert made.wire == pytest.approx(32_600)
    assert made.disk == pytest.approx(3260 / 200e6)
    assert made.memory == pytest.approx((172_800 * 1e4 + 200_000 * 1e3) / (48 * 2**30))
    assert made.uploads == 8e6
    assert (made.first, made.shards) == ("Redis' core", 1)
    more = plan(found, 1000, 50.0, days=1.0, video=4e6)
    assert (more.first, more.shards) == ("Redis' core", 5)  # 3.26 cores at 70 %
    assert plan(found, 1000, 50.0, days=30.0, video=4e6).first == "memory of ended jobs"


def test_a_measurement_is_of_this_store() -> None:
    found = measure(60, settle=0.0)
    assert {*found.costs} == {*NAMES}
    for name, cost in found.costs.items():
        assert 1 < cost.micros < 20_000, name
        assert 100 < cost.wire < 20_000, name
    assert found.costs["claim"].micros > found.costs["read"].micros
    assert 500 < found.waiting < 10_000
    assert found.ended > found.waiting


def test_the_docs_say_what_was_measured() -> None:
    """The tables in operations.md are those of the figures that are kept beside the simulation's."""
    kept = json.loads((DOCS / "simulation/capacity.json").read_text())
    figures, asked = kept["measured"], kept["asked"]
    costs = {name: Cost(**cost) for name, cost in figures.pop("costs").items()}
    found = Measured(costs=costs, **figures)
    plans = [
        plan(found, nodes, asked["seconds"], days, asked["video"])
        for nodes in asked["nodes"]
        for days in asked["days"]
    ]
    text = tables(found, plans, asked["seconds"], asked["video"])
    page = (DOCS / "operations.md").read_text()
    assert f"{capacity.BEGIN}\n{text}\n{capacity.END}" in page
    assert max(p.nodes for p in plans) >= 10_000
    assert max(p.jobs_a_day for p in plans) >= 10e6

"""The simulation: small runs of every fleet, its clock, its load and its pictures."""

import math
import random
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest
import simpy

from benchmarks.simulation import __main__ as command
from benchmarks.simulation.clock import virtual_store
from benchmarks.simulation.fleets import Keda
from benchmarks.simulation.load import DAY, MEAN, arrivals, diurnal
from benchmarks.simulation.picture import Line, Panel, draw
from benchmarks.simulation.scenarios import SCENARIOS, fleets, play, quantile, resized
from benchmarks.simulation.world import MODEL, World
from infra.scaler.drivers.simulated import Offer
from jobs.job import Priority
from tests.support.jobs import new_job, result

LOST_CLOUD = SCENARIOS[2]


@pytest.mark.parametrize("number", range(4))
def test_no_fleet_loses_a_job_when_a_cloud_goes(number: int) -> None:
    scenario = replace(resized(LOST_CLOUD, 8.0), outage=("spot-a", 3600.0, 7200.0))
    fleet = fleets(scenario)[number]
    outcome = play(scenario, fleet, seed=3, scale=0.12)
    assert outcome.jobs > 200
    assert outcome.lost == 0
    assert outcome.repeats > 0  # or nothing was tried
    assert 0 < outcome.utilisation <= 1
    assert 0 <= outcome.p50 <= outcome.p95 <= outcome.p99
    assert outcome.cost > 0


def test_kedas_fleet_shrinks_to_its_least_even_if_it_was_booting() -> None:
    """A fair rival: its pods that are told to go while they boot must not come up and stay."""
    env, keda = simpy.Environment(), Keda(1.0, least=2, most=40)
    with virtual_store(lambda: float(env.now)) as store:
        world = World(env, store, [Offer("a", price=1.0, stock=40, boot=330.0)], random.Random(4))
        env.process(world.every(keda.interval, lambda: keda.step(world)))
        request = next(arrivals(diurnal(1.0), 1.0, DAY, random.Random(1), MODEL)).job.request
        env.run(until=10)
        for _ in range(40):
            store.submit(new_job(request=request))
        env.run(until=200)  # all ordered, none up
        assert len(world.machines()) == 40
        while job := store.claim(MODEL, "somebody else"):
            store.finish(job.id, job.token, result(job.id, job.token))
        env.run(until=1200)
        assert len(world.machines()) == len(world.registry) == 2


def test_the_same_seed_gives_the_same_outcome_but_for_names() -> None:
    scenario = resized(LOST_CLOUD, 2.0)
    first, second = (play(scenario, fleets(scenario)[2], 5, 0.03) for _ in range(2))
    assert first == second


def test_the_queues_clock_is_virtual_and_its_order_real() -> None:
    now = [1000.0]
    with virtual_store(lambda: now[0]) as store:
        low, _ = store.submit(new_job(priority=Priority.LOW))
        assert low.created_at == 1000.0
        now[0] = 1001.0
        high, _ = store.submit(new_job(priority=Priority.HIGH))
        first = store.claim("tiny", "node_a")
        assert first is not None
        assert (first.id, first.started_at) == (high.id, 1001.0)
        now[0] = 1e6
        assert store.claim("tiny", "node_b").id == low.id  # type: ignore[union-attr]
        assert store.claim("tiny", "node_b") is None  # a live node's lease never ends by itself here
        store.let_lease_end(high.id, first.token, 15.0)
        now[0] += 14.0
        assert store.claim("tiny", "node_b") is None
        now[0] += 1.1
        again = store.claim("tiny", "node_b")
        assert again is not None
        assert (again.id, again.attempts) == (high.id, 1)
        assert again.token > first.token


def test_arrivals_follow_the_rate(rng: random.Random) -> None:
    rate = diurnal(4.0)
    jobs = list(arrivals(rate, 4.0 / MEAN * 1.7, DAY, rng, "m"))
    expected = DAY * 4.0 / MEAN
    assert abs(len(jobs) - expected) < 5 * math.sqrt(expected)
    night = sum(a.at < DAY / 8 or a.at > DAY * 7 / 8 for a in jobs)
    noon = sum(DAY * 3 / 8 < a.at < DAY * 5 / 8 for a in jobs)
    assert noon > 3 * night
    work = sum(a.seconds for a in jobs) / len(jobs)
    assert abs(work - MEAN) < 5
    assert len({a.job.id for a in jobs}) == len(jobs)


def test_quantiles_by_hand() -> None:
    values = [float(n) for n in range(1, 101)]
    assert (quantile(values, 0.5), quantile(values, 0.99), quantile([7.0], 0.95)) == (51, 100, 7)


def test_pictures_are_svg_and_keep_peaks() -> None:
    line = Line("a & b", [(x / 100, 9.0 if x == 777 else 1.0) for x in range(2400)])
    text = draw("Nodes < jobs", [Panel("nodes", [line]), Panel("jobs", [line, line])])
    root = ET.fromstring(text)
    polylines = root.findall("{http://www.w3.org/2000/svg}polyline")
    assert len(polylines) == 3
    assert text.count("a &amp; b") == 1  # one legend
    assert all(len(p.attrib["points"].split()) < 500 for p in polylines)
    heights = [float(point.split(",")[1]) for point in polylines[0].attrib["points"].split()]
    assert len(set(heights)) == 2  # the one peak is drawn


def test_one_command_writes_table_and_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "operations.md").write_text(f"# Before\n{command.BEGIN}\nold\n{command.END}\n# After\n")
    arguments = ["simulation", "--scale", "0.01", "--docs", str(tmp_path), "--only", "lost-cloud"]
    monkeypatch.setattr("sys.argv", arguments)
    monkeypatch.setattr(command, "SCENARIOS", tuple(resized(s, 2.0) for s in SCENARIOS))
    command.main()
    page = (tmp_path / "operations.md").read_text()
    assert page.startswith("# Before\n")
    assert page.endswith("# After\n")
    assert "old" not in page
    assert "| reel scaler, 400 s |" in page
    assert "| KEDA queue length |" in page
    assert (tmp_path / "simulation" / "lost-cloud.svg").read_text().startswith("<svg")

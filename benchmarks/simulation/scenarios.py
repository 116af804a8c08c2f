"""The three days that the fleets live through, and what is measured of them."""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import simpy

from benchmarks.simulation.clock import virtual_store
from benchmarks.simulation.fleets import Fixed, Fleet, Keda, Scaler
from benchmarks.simulation.load import DAY, HOUR, MEAN, Rate, arrivals, diurnal, spike
from benchmarks.simulation.world import MODEL, Tally, World
from infra.scaler.drivers.simulated import Offer
from infra.scaler.policy import Policy

# A market to try things in, not today's prices: an 8-GPU machine per hour; boot until the weights are loaded.
OFFERS = (
    Offer("spot-a", price=14.0, stock=14, boot=300.0, loss_per_hour=0.05),
    Offer("on-demand-b", price=22.0, stock=20, boot=420.0),
    Offer("on-demand-c", price=26.0, stock=40, boot=240.0),
)
TARGET = 400.0  # seconds from submit to the finished video that the scaler aims at, on average
HASTE = 200.0  # the same for somebody who pays for shorter waits
LEAST, MOST = 2, 70
POLICY = Policy(
    target_wait=TARGET, min_nodes=LEAST, max_nodes=MOST, price_per_hour=22.0, job_seconds=MEAN, max_add=20,
    remove_window=600.0, boot_seconds=1500.0, add_cooldown=60.0,
)  # fmt: skip


@dataclass(frozen=True)
class Scenario:
    """One load on one market. nodes: of work on average without the spike. fixed: the fixed fleet's size."""

    name: str
    title: str
    days: float
    nodes: float
    fixed: int
    peak: float  # times the average rate, at most
    shape: Callable[[Rate], Rate] = lambda rate: rate
    outage: tuple[str, float, float] | None = None

    @property
    def rate(self) -> Rate:
        """Jobs a second at a time."""
        return self.shape(diurnal(self.nodes))


def _spiked(rate: Rate) -> Rate:
    return spike(rate, 10 * HOUR, 10.5 * HOUR, 10.0)


SCENARIOS = (
    Scenario("diurnal", "Seven days, from 0.3 to 1.7 times the average load", 7, 12.9, 24, 1.7),
    Scenario("spike", "One day, ten times the load from 10:00 to 10:30", 1, 5.0, 10, 17.0, _spiked),
    Scenario(
        "lost-cloud", "One day, the cheapest cloud gone from 10:00 to 14:00", 1, 12.9, 24, 1.7,
        outage=("spot-a", 10 * HOUR, 14 * HOUR),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """One fleet's time in one scenario. Waits in seconds: from submit to done, less the job's own seconds."""

    scenario: str
    fleet: str
    jobs: int
    lost: int  # jobs that never finished; must be 0
    repeats: int
    p50: float
    p95: float
    p99: float
    utilisation: float  # of node seconds that were up
    cost: float  # per video
    series: list[tuple[float, int, int, int]]


def fleets(scenario: Scenario) -> list[Fleet]:
    """Those to compare. KEDA's rule gets as many waiting jobs a node as make the average wait of TARGET.

    In a single day (the week takes long enough) the scaler also runs with a shorter target.
    """
    found: list[Fleet] = [Scaler(POLICY), Keda((TARGET - MEAN) / MEAN, LEAST, MOST), Fixed(scenario.fixed)]
    if scenario.days <= 1:
        found.append(Scaler(replace(POLICY, target_wait=HASTE)))
    return found


def play(scenario: Scenario, fleet: Fleet, seed: int, scale: float = 1.0) -> Outcome:
    """One run. scale: of the time (0.1 of a week is 17 hours). The same seed gives every fleet the same jobs.
    """
    env = simpy.Environment()
    with virtual_store(lambda: float(env.now)) as store:
        world = World(env, store, list(OFFERS), random.Random(seed))
        until = scenario.days * DAY * scale
        base = scenario.nodes / MEAN
        jobs = arrivals(scenario.rate, base * scenario.peak, until, random.Random(seed + 1), MODEL)
        env.process(world.every(fleet.interval, lambda: fleet.step(world)))
        env.process(world.submit_all(jobs))
        if scenario.outage is not None:
            cloud, start, end = scenario.outage
            env.process(world.outage(cloud, start, end))
        env.run(until=until)
        bill = world.cloud.cost()
        while len(world.tally.waits) < world.tally.submitted and env.now < until + DAY:
            env.run(until=env.now + 60)  # the last ones finish; nothing new comes
        return _outcome(scenario, fleet, world, bill, until)


def _outcome(scenario: Scenario, fleet: Fleet, world: World, bill: float, until: float) -> Outcome:
    tally = world.tally
    up = tally.up + sum(world.env.now - node.started_at for node in world.registry.values())
    waits = sorted(tally.waits)
    done = [point for point in tally.series if point[0] <= until]
    return Outcome(
        scenario=scenario.name,
        fleet=fleet.name,
        jobs=tally.submitted,
        lost=tally.submitted - len(waits),
        repeats=tally.repeats,
        p50=quantile(waits, 0.5),
        p95=quantile(waits, 0.95),
        p99=quantile(waits, 0.99),
        utilisation=tally.busy / up,
        cost=bill / len(waits),
        series=done,
    )


def quantile(ordered: list[float], share: float) -> float:
    """The nearest-rank quantile of sorted values."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def resized(scenario: Scenario, nodes: float) -> Scenario:
    """The same with another average load, for tests."""
    return replace(scenario, nodes=nodes, fixed=max(1, round(scenario.fixed * nodes / scenario.nodes)))


__all__ = ["SCENARIOS", "Outcome", "Scenario", "Tally", "fleets", "play", "resized"]

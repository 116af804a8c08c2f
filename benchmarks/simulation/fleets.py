"""Who decides how many nodes there are: the service's scaler, a fixed number, or KEDA's plain queue-length
rule.
"""

import math
from typing import Protocol

from benchmarks.simulation.world import MODEL, World
from infra.scaler.driver import Health, StockOut
from infra.scaler.policy import Memory, Policy
from infra.scaler.reconcile import Pool, machine_name


class Fleet(Protocol):
    """Anything that can be asked for a pass."""

    name: str
    interval: float  # seconds between passes

    def step(self, world: World) -> int:
        """One pass; how many nodes it wants."""
        ...


class Kept:
    """The scaler's memory, kept in this process."""

    def __init__(self) -> None:
        self._memory = Memory()

    def load(self, model: str) -> Memory:
        """The last one."""
        return self._memory

    def save(self, model: str, memory: Memory) -> None:
        """Keep it."""
        self._memory = memory


class Scaler:
    """The service's own, every line of it but Redis' copy of its memory."""

    interval = 30.0

    def __init__(self, policy: Policy) -> None:
        self.name = f"reel scaler, {policy.target_wait:.0f} s"
        self._policy = policy
        self._memory = Kept()

    def step(self, world: World) -> int:
        """Look, decide, act."""
        return Pool(MODEL, self._policy, world, world, self._memory).step().decision.target


class Fixed:
    """Always `count` machines; a lost one is ordered again at the next pass."""

    interval = 60.0

    def __init__(self, count: int) -> None:
        self.name = f"fixed, {count} nodes"
        self._count = count

    def step(self, world: World) -> int:
        """Clean up, fill up."""
        world.load(MODEL)
        _fill(world, self._count)
        return self._count


class Keda:
    """desired = ceil(waiting / `per_node`), as KEDA's list scaler feeds it to the HorizontalPodAutoscaler.

    With the HPA's defaults (Kubernetes documentation, "Horizontal Pod Autoscaling"): a tolerance of 10 %, up
    by at most 100 % or 4 pods per round (30 s here), down to the highest wish of the last 300 s, youngest
    pods first. It is given what plain pods need not have: the service's drain on SIGTERM, and every cloud's
    machines.
    """

    name = "KEDA queue length"
    interval = 30.0

    def __init__(self, per_node: float, least: int, most: int) -> None:
        self._per_node = per_node
        self._least = least
        self._most = most
        self._wishes: list[tuple[float, int]] = []
        self._leaving: set[str] = set()

    def step(self, world: World) -> int:
        """One of the HPA's rounds."""
        for machine in world.machines():
            node = world.registry.get(machine.name)
            if machine.health is Health.LOST or (machine.name in self._leaving and node is None):
                world.remove(machine.name)
        alive = [m for m in world.machines() if m.name not in self._leaving]
        waiting, _, _ = world.load(MODEL)
        count = len(alive)
        wish = math.ceil(waiting / self._per_node)
        if count and abs(waiting / (count * self._per_node) - 1) <= 0.1:
            wish = count
        wish = max(self._least, min(self._most, wish))
        now = world.now()
        self._wishes = [(at, n) for at, n in self._wishes if at > now - 300] + [(now, wish)]
        if wish > count:
            leaving = len(world.machines()) - count
            _fill(world, count + min(wish - count, max(count, 4)) + leaving)
        keep = max(n for _, n in self._wishes)
        for machine in sorted(alive, key=lambda m: -m.since)[: max(0, count - keep)]:
            self._end(world, machine.name)
        return wish

    def _end(self, world: World, name: str) -> None:
        """A pod that serves drains; one that has not come up ends at once."""
        if name in world.registry:
            self._leaving.add(name)
            world.drain(name)
        else:
            world.remove(name)


def _fill(world: World, count: int) -> None:
    """Remove what is lost, order what is missing, as far as there is stock."""
    for machine in world.machines():
        if machine.health is Health.LOST:
            world.remove(machine.name)
    for _ in range(count - len(world.machines())):
        try:
            world.add(machine_name(MODEL))
        except StockOut:
            return

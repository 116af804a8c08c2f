"""Every kind of fault, at an edge of a job's life where one can be named; counted when it took effect."""

import asyncio
import random
from collections.abc import Mapping

from tests.chaos.history import History
from tests.chaos.injector import Inject
from tests.chaos.load import Load
from tests.chaos.node_faults import NodeFaults
from tests.chaos.peer_faults import PeerFaults
from tests.chaos.role_faults import RoleFaults
from tests.chaos.world import World

# Asked for in a job's prompt: another fault may hit that job first, so one more is fired of each.
ASKED = frozenset({"poison", "out of memory", "hung rank"})


def wanted(kind: str, number: int) -> int:
    """How often a kind must fire to take effect `number` times."""
    return number + (kind in ASKED)


class Faults:
    """Lanes of faults, all at once: what kills nodes, ranks and other processes, freezes, wires."""

    def __init__(self, world: World, load: Load, history: History, rng: random.Random) -> None:
        self.history, self.rng = history, rng
        self.roles = RoleFaults(world, load, history, rng)
        self._injectors = (
            NodeFaults(world, load, history, rng),
            self.roles,
            PeerFaults(world, load, history, rng),
        )
        self.lanes = {name: kinds for one in self._injectors for name, kinds in one.lanes.items()}
        self.stopped = False

    def stop(self) -> None:
        """No new fault."""
        self.stopped = True
        for one in self._injectors:
            one.stopped = True

    @property
    def kinds(self) -> list[str]:
        """Every kind there is."""
        return [name for lane in self.lanes.values() for name in lane]

    def short(self, floor: int) -> list[str]:
        """Kinds that fired too seldom to have taken effect `floor` times."""
        return [kind for kind in self.kinds if self.history.counts.get(kind, 0) < wanted(kind, floor)]

    async def run(self, pauses: Mapping[str, float], enough: int) -> None:
        """All lanes until `stopped`. pauses: mean seconds between two faults of each lane.

        enough: a kind that fired so often rests (0: none does), as in the short version.
        """
        await asyncio.gather(*(self._lane(kinds, pauses[name], enough) for name, kinds in self.lanes.items()))

    async def _lane(self, kinds: dict[str, Inject], pause: float, enough: int) -> None:
        deck: list[str] = []
        while not self.stopped:
            if not deck:
                counts = self.history.counts
                deck = [kind for kind in kinds if not enough or counts.get(kind, 0) < wanted(kind, enough)]
                self.rng.shuffle(deck)
            if not deck:
                return
            kind = deck.pop()
            try:
                await kinds[kind]()
            except Exception as error:
                self.history.add(
                    "note", what="injector", fault=kind, error=f"{type(error).__name__}: {error}"
                )
            await asyncio.sleep(self.rng.uniform(0.5, 1.5) * pause)

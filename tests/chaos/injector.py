"""What all injectors share: the world, when to strike, and on whom."""

import asyncio
import random
from collections.abc import Awaitable, Callable

from tests.chaos.history import History
from tests.chaos.load import Load
from tests.chaos.redis_wire import Call, RedisWire, Trap
from tests.chaos.world import World

PATIENCE = 4.0  # seconds for a trap to spring; then the fault comes at whatever moment it is
Inject = Callable[[], Awaitable[None]]


class Injector:
    """One group of faults. lanes: by lane and kind of fault, how it is injected."""

    lanes: dict[str, dict[str, Inject]]

    def __init__(self, world: World, load: Load, history: History, rng: random.Random) -> None:
        self.world, self.load, self.history, self.rng = world, load, history, rng
        self.stopped = False

    @staticmethod
    def bind(call: Callable[..., Awaitable[None]], *args: str) -> Inject:
        """A call with its arguments."""
        return lambda: call(*args)

    def _free(self) -> list[str]:
        """Nodes that may be hit: up, and not frozen."""
        return [who for who in self.world.up() if not self.world.parts[who].frozen]

    async def _two_up(self) -> None:
        while len(self._free()) < 2 and not self.stopped:
            await asyncio.sleep(0.2)

    async def _spring(
        self,
        parties: list[str],
        wanted: Callable[[Call], bool],
        edge: str,
        action: Callable[[Call], str | None],
        patience: float = PATIENCE,
    ) -> bool:
        """Arm one trap on several wires; whether it sprang in time."""

        async def act(call: Call) -> str | None:
            return action(call)

        trap = Trap(wanted, edge, act)
        wires: list[RedisWire] = [self.world.wires[who] for who in parties]
        for wire in wires:
            wire.traps.append(trap)
        try:
            await asyncio.wait_for(trap.sprung.wait(), patience)
            return True
        except TimeoutError:
            return trap.sprung.is_set()
        finally:
            trap.sprung.set()
            for wire in wires:
                if trap in wire.traps:
                    wire.traps.remove(trap)

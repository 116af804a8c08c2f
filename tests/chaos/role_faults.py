"""Faults of everything but nodes: roles and stores die, replies and clocks go wrong."""

import asyncio
import random
import signal
import threading

from tests.chaos.history import History
from tests.chaos.injector import PATIENCE, Injector
from tests.chaos.load import Load
from tests.chaos.redis_wire import Call
from tests.chaos.world import World
from worker.sweeper import sweep

SKEW_SECONDS = 300.0


class RoleFaults(Injector):
    """API, Celery, Redis and S3 die or are out of reach; a reply is lost; a clock jumps; sweeps collide."""

    def __init__(self, world: World, load: Load, history: History, rng: random.Random) -> None:
        super().__init__(world, load, history, rng)
        bind = self.bind
        self.lanes = {
            "roles": {
                "kill api": bind(self.kill_role, "api"),
                "kill celery worker": bind(self.kill_role, "celery-worker"),
                "kill celery beat": self.kill_beat,
                "kill redis": self.kill_redis,
                "kill s3": self.kill_s3,
                "redis unreachable": self.redis_away,
            },
            "rest": {
                "dropped reply": self.drop_reply,
                "clock skew": self.skew,
                "two sweeps at once": self.two_sweeps,
            },
        }

    async def kill_role(self, who: str) -> None:
        """The API or the Celery worker, in the middle of what it does."""
        scripts = ("submit",) if who == "api" else ("outbox_take", "outbox_settle", "lose", "expire")
        edge = self.rng.choice(["before", "applied", "after"])

        def kill(edge_name: str) -> None:
            if self.world.parts[who].send(signal.SIGKILL):
                self.history.fault(f"kill {who.replace('-', ' ')}", edge=edge_name)

        if not await self._spring(
            [who], lambda call: call.script in scripts, edge, lambda call: kill(f"{call.script} {edge}")
        ):
            kill("any")

    async def kill_beat(self) -> None:
        """At any time: it holds nothing."""
        if self.world.parts["celery-beat"].send(signal.SIGKILL):
            self.history.fault("kill celery beat")

    async def kill_redis(self) -> None:
        """Just before, or just after, it did what a script asked; the AOF brings everything back."""
        script = self.rng.choice(["submit", "claim", "finish", "heartbeat", "outbox_settle"])
        edge = self.rng.choice(["before", "applied"])

        def act(call: Call) -> None:
            if self.world.parts["redis"].send(signal.SIGKILL):
                self.history.fault("kill redis", edge=f"{script} {edge}", job=call.job)

        await self._spring(sorted(self.world.wires), lambda call: call.script == script, edge, act)

    async def kill_s3(self) -> None:
        """While something is being uploaded."""
        self.world.s3.on_put.clear()
        try:
            await asyncio.wait_for(self.world.s3.on_put.wait(), PATIENCE)
        except TimeoutError:
            return
        if self.world.parts["weed"].send(signal.SIGKILL):
            self.history.fault("kill s3")

    async def redis_away(self, seconds: float | None = None) -> None:
        """Nobody reaches Redis for some seconds."""
        seconds = seconds or self.rng.uniform(1.0, 3.0)
        for wire in self.world.wires.values():
            wire.cut()
        self.history.fault("redis unreachable", seconds=seconds)
        await asyncio.sleep(seconds)
        for wire in self.world.wires.values():
            wire.up = True

    async def drop_reply(self) -> None:
        """A script ran, and its caller never hears of it."""
        choices = ("claim", "heartbeat", "finish", "submit", "outbox_take", "outbox_settle", "cancel", "fail")
        script = self.rng.choice(choices)

        def act(call: Call) -> str:
            self.history.fault("dropped reply", script=call.script, who=call.who, job=call.job)
            return "drop"

        def wanted(call: Call) -> bool:
            return call.script == script and call.result not in ("none", "more")

        await self._spring(sorted(self.world.wires), wanted, "applied", act)

    async def skew(self) -> None:
        """A node's clock jumps by five minutes, or back."""
        who = self.rng.choice(self.world.nodes)
        file = self.world.skew_file(who)
        offset = 0.0 if float(file.read_text() or 0) else self.rng.choice([SKEW_SECONDS, -SKEW_SECONDS])
        file.write_text(str(offset))
        self.history.fault("clock skew", who=who, offset=offset)

    async def two_sweeps(self) -> None:
        """Two sweeps start at the same moment, beside Celery's own."""
        together = threading.Barrier(2)

        def one() -> int:
            together.wait(5)
            return sweep(self.world.store)

        changed = await asyncio.gather(asyncio.to_thread(one), asyncio.to_thread(one))
        self.history.fault("two sweeps at once", changed=changed)

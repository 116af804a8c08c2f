"""Every kind of fault, at an edge of a job's life where one can be named; counted when it took effect."""

import asyncio
import random
import signal
import threading
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from jobs.nodes import NodeRegistry
from tests.chaos.history import History
from tests.chaos.load import Load
from tests.chaos.parts import kill_one
from tests.chaos.receiver import HookFault
from tests.chaos.redis_wire import Call, RedisWire, Trap
from tests.chaos.s3_wire import S3Fault
from tests.chaos.world import LEASE_SECONDS, REAL, SWEEP_SECONDS, World
from worker.sweeper import sweep

PATIENCE = 4.0  # seconds for a trap to spring; then the fault comes at whatever moment it is
SKEW_SECONDS = 300.0
# (script, phase or "", edge): where a node is hit.
NODE_EDGES = (
    ("claim", "", "applied"),
    ("claim", "", "after"),
    ("heartbeat", "denoising", "applied"),
    ("heartbeat", "denoising", "after"),
    ("heartbeat", "publishing", "after"),
    ("finish", "", "before"),
    ("finish", "", "applied"),
    ("finish", "", "after"),
)
TITLES = {
    "kill rank": ("RankActor",),
    "kill agent": ("DashboardAgent", "RuntimeEnvAgent"),
    "kill raylet": ("raylet",),
    "kill gcs": ("gcs_server",),
}
Inject = Callable[[], Awaitable[None]]


class Faults:
    """Lanes of faults, all at once: what kills nodes, ranks and other processes, freezes, wires."""

    def __init__(self, world: World, load: Load, history: History, rng: random.Random) -> None:
        self.world, self.load, self.history, self.rng = world, load, history, rng
        self.stopped = False
        self._poisons: set[asyncio.Task[Any]] = set()
        bind = self._bind
        collective = {"hung collective": self.hung_collective} if world.model else {}
        inside = {name: bind(self.kill_inside, name) for name in TITLES}
        self.lanes: dict[str, dict[str, Inject]] = {
            "nodes": {
                **{name: inject for name, inject in inside.items() if name != "kill rank"},
                "kill node": self.kill_node,
                "freeze and kill after a claim": self.freeze_and_kill,
                "drain": self.drain,
                "poison": bind(self.directive, "poison", "kill=3"),
            },
            "ranks": {
                "kill rank": inside["kill rank"],
                "out of memory": bind(self.directive, "out of memory", "oom=1"),
                "hung rank": bind(self.directive, "hung rank", "hang=1"),
                **collective,
            },
            "frozen": {"stop past the lease": self.stop_and_resume},
            "roles": {
                "kill api": bind(self.kill_role, "api"),
                "kill celery worker": bind(self.kill_role, "celery-worker"),
                "kill celery beat": self.kill_beat,
                "kill redis": self.kill_redis,
                "kill s3": self.kill_s3,
                "redis unreachable": self.redis_away,
            },
            "s3": {f"s3 {kind}": bind(self.s3_fault, kind) for kind in ("503", "hang", "partial")},
            "webhooks": {
                **{f"webhook {kind}": bind(self.hook_fault, kind) for kind in ("hang", "500", "429")},
                "webhook 410": self.hook_gone,
            },
            "rest": {
                "dropped reply": self.drop_reply,
                "clock skew": self.skew,
                "two sweeps at once": self.two_sweeps,
            },
        }

    @staticmethod
    def _bind(call: Callable[..., Awaitable[None]], *args: str) -> Inject:
        return lambda: call(*args)

    @property
    def kinds(self) -> list[str]:
        """Every kind there is."""
        return [name for lane in self.lanes.values() for name in lane]

    def short(self, floor: int) -> list[str]:
        """Kinds that fired fewer than `floor` times."""
        return [kind for kind in self.kinds if self.history.counts.get(kind, 0) < floor]

    async def run(self, pauses: Mapping[str, float], enough: int) -> None:
        """All lanes until `stopped`. pauses: mean seconds between two faults of each lane.

        enough: a kind that fired so often rests (0: none does), as in the short version.
        """
        await asyncio.gather(*(self._lane(kinds, pauses[name], enough) for name, kinds in self.lanes.items()))

    async def _lane(self, kinds: dict[str, Inject], pause: float, enough: int) -> None:
        deck: list[str] = []
        while not self.stopped:
            if not deck:
                deck = [kind for kind in kinds if not enough or self.history.counts.get(kind, 0) < enough]
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

    # Which process, and when

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

    async def _at_node_edge(self, kind: str, hit: Callable[[str], bool]) -> None:
        """Let `hit` (a node's name to whether something was hit) happen at a random edge of a job's life."""
        await self._two_up()
        script, phase, edge = self.rng.choice(NODE_EDGES)

        def wanted(call: Call) -> bool:
            if call.script != script or call.who not in free:
                return False
            if phase and (len(call.args) < 3 or call.args[2] != phase):
                return False
            return edge == "before" or call.result == "ok"

        def act(call: Call) -> None:
            if hit(call.who):
                self.history.fault(
                    kind, who=call.who, edge=f"{script} {phase} {edge}", job=call.job, token=call.token
                )

        free = set(self._free()) & set(self.world.engines)
        if not await self._spring(sorted(free), wanted, edge, act) and (left := self._free()):
            who = self.rng.choice(left)
            if hit(who):
                self.history.fault(kind, who=who, edge="any")

    # What takes a node down

    async def kill_inside(self, kind: str) -> None:
        """A rank, an agent, the raylet, or the GCS."""
        titles = TITLES[kind]
        title = self.rng.choice(titles)
        await self._at_node_edge(kind, lambda who: kill_one(self.world.parts[who].find(title)) is not None)

    async def kill_node(self) -> None:
        """The supervisor, the cluster's host, the node actor, or all processes of a node at once."""
        which = self.rng.choice(["supervisor", "host", "actor", "everything"])

        def hit(who: str) -> bool:
            part = self.world.parts[who]
            if which == "everything":
                return part.kill_family()
            if which == "supervisor":
                return part.send(signal.SIGKILL)
            return kill_one(part.find("worker.host" if which == "host" else "NodeActor")) is not None

        await self._at_node_edge("kill node", hit)

    async def freeze_and_kill(self) -> None:
        """A node that claims a job, stops at once, and dies without another word."""
        await self._two_up()
        hit: list[str] = []

        def act(call: Call) -> None:
            if self.world.parts[call.who].freeze():
                hit.append(call.who)
                self.history.fault(
                    "freeze and kill after a claim", who=call.who, job=call.job, token=call.token
                )

        await self._spring(
            self._free(), lambda call: call.script == "claim" and call.result == "ok", "applied", act, 8.0
        )
        await asyncio.sleep(self.rng.uniform(0.5, 1.5))
        for who in hit:
            self.world.parts[who].kill_family()

    async def drain(self) -> None:
        """SIGTERM, `reel drain` or a spot notice, while a job runs that won't be done within the grace."""
        await self._two_up()
        job_id = await self.load.submit(sampling_steps=90, priority="high")
        by = self.rng.choice(["signal", "command", "notice"])

        def act(call: Call) -> None:
            part = self.world.parts[call.who]
            if by == "signal":
                part.send(signal.SIGTERM)
            elif by == "command":
                NodeRegistry(self.world.store.redis).request_drain(call.who)
            else:
                self.world.receiver.reclaimed.add(call.who)
            self.history.fault("drain", who=call.who, job=call.job, token=call.token, by=by)

        await self._spring(
            self.world.nodes,
            lambda call: call.script == "heartbeat" and call.job == job_id and call.result == "ok",
            "after",
            act,
            20.0,
        )

    async def directive(self, kind: str, words: str) -> None:
        """A job whose prompt makes the engine fail; the checker looks whether it did."""
        await self._two_up()
        job_id = await self.load.submit(prompt=f"please {words}", priority="high")
        self.history.fault(kind, job=job_id, asked=words)

    async def hung_collective(self) -> None:
        """One of the real engine's two ranks stops for good in the middle of a job, and the other waits."""
        job_id = await self.load.submit_real(sampling_steps=60, priority="high")

        def act(call: Call) -> None:
            ranks = self.world.parts[REAL].find("RankActor")
            if len(ranks) > 1:
                self.rng.choice(ranks).suspend()
                self.history.fault("hung collective", job=call.job, token=call.token)

        def wanted(call: Call) -> bool:
            beat = call.script == "heartbeat" and call.job == job_id
            return beat and call.result == "ok" and call.args[2] == "denoising"

        await self._spring([REAL], wanted, "after", act, 40.0)

    # What freezes one

    async def stop_and_resume(self) -> None:
        """SIGSTOP while a job runs, until its lease is long over; then SIGCONT: its writes must lose."""
        await self._two_up()
        hit: list[str] = []

        def act(call: Call) -> None:
            if self.world.parts[call.who].freeze():
                hit.append(call.who)
                self.history.fault("stop past the lease", who=call.who, job=call.job, token=call.token)

        def wanted(call: Call) -> bool:
            return call.script == "heartbeat" and call.result == "ok" and call.args[2] == "denoising"

        await self._spring(self._free(), wanted, "after", act, 8.0)
        if hit:
            await asyncio.sleep(LEASE_SECONDS + SWEEP_SECONDS + 2.0)
        for who in hit:
            self.world.parts[who].thaw()

    # Everything else

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

    async def s3_fault(self, kind: str) -> None:
        """The next upload fails in this way."""
        fault = S3Fault(kind)
        self.world.s3.faults.append(fault)
        try:
            await asyncio.wait_for(fault.hit.wait(), 10)
            self.history.fault(f"s3 {kind}", key=fault.key)
        except TimeoutError:
            if fault in self.world.s3.faults:
                self.world.s3.faults.remove(fault)

    async def hook_fault(self, kind: str) -> None:
        """The next webhook is answered in this way, or not at all."""
        fault = HookFault(kind)
        self.world.receiver.faults.append(fault)
        try:
            await asyncio.wait_for(fault.hit.wait(), 10)
            self.history.fault(f"webhook {kind}", job=fault.job)
        except TimeoutError:
            if fault in self.world.receiver.faults:
                self.world.receiver.faults.remove(fault)

    async def hook_gone(self) -> None:
        """An endpoint that answers 410: it must never be posted to again."""
        path = f"/gone/{self.load.sent}"
        hit = self.world.receiver.gone[path] = asyncio.Event()
        job_id = await self.load.submit(callback_url=self.world.receiver.url(path), priority="high")
        await asyncio.wait_for(hit.wait(), 60)
        self.history.fault("webhook 410", job=job_id, path=path)

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

"""Faults of nodes: their processes die, freeze, drain, or their engine fails."""

import asyncio
import random
import signal
from collections.abc import Callable

from jobs.nodes import NodeRegistry
from tests.chaos.history import History
from tests.chaos.injector import Injector
from tests.chaos.load import Load
from tests.chaos.parts import kill_one
from tests.chaos.redis_wire import Call
from tests.chaos.world import LEASE_SECONDS, REAL, SWEEP_SECONDS, World

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


class NodeFaults(Injector):
    """What takes a node down, hits a rank, or freezes a node."""

    def __init__(self, world: World, load: Load, history: History, rng: random.Random) -> None:
        super().__init__(world, load, history, rng)
        bind = self.bind
        collective = {"hung collective": self.hung_collective} if world.model else {}
        inside = {name: bind(self.kill_inside, name) for name in TITLES}
        self.lanes = {
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
        }

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
        # long enough for a heartbeat while it denoises
        job_id = await self.load.submit_real(longest=True, sampling_steps=100, priority="high")

        def act(call: Call) -> None:
            ranks = self.world.parts[REAL].find("RankActor")
            if len(ranks) > 1:
                self.rng.choice(ranks).suspend()
                self.history.fault("hung collective", job=call.job, token=call.token)

        def wanted(call: Call) -> bool:
            beat = call.script == "heartbeat" and call.job == job_id
            return beat and call.result == "ok" and call.args[2] == "denoising"

        await self._spring([REAL], wanted, "after", act, 40.0)

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

"""The whole service as real processes, with a wire of ours in front of every connection that can fail."""

import asyncio
import contextlib
import os
import random
import secrets
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from infra import probes
from infra.docker.make_secrets import ROLES as USERS
from infra.ports import HOST, PortBlock
from infra.process import PartSpec
from infra.reaper import adopt_orphans, kill_descendants
from infra.redis_server import redis_part
from infra.weed import PORTS, sockets, weed_part
from jobs.client import connect
from jobs.keys import KeyStore, Scope
from jobs.settings import Settings
from jobs.storage import ObjectStore
from jobs.store import JobStore
from tests.chaos.history import History
from tests.chaos.parts import ROOT, Part, reel
from tests.chaos.receiver import Receiver
from tests.chaos.redis_wire import RedisWire
from tests.chaos.s3_wire import S3Wire

LEASE_SECONDS, SWEEP_SECONDS, MAX_ATTEMPTS = 4.0, 1.0, 3
UP_SECONDS = 3.0  # a node that asked for a job this recently is up
ROLES = ("api", "celery-worker", "celery-beat")
REAL = "real-1"  # the node with the real engine


class World:
    """Start, keep alive, and tear down. Everything on loopback, all data in `folder`."""

    def __init__(
        self, folder: Path, history: History, rng: random.Random, nodes: int, model: Path | None
    ) -> None:
        self.folder, self.history, self.rng = folder, history, rng
        self.model = model  # a real checkpoint for one more node; None: no such node
        self.nodes = [f"node-{number}" for number in range(1, nodes + 1)]
        self.receiver = Receiver(history)
        self.runs = folder / "runs"
        self.parts: dict[str, Part] = {}
        self.wires: dict[str, RedisWire] = {}
        self._ports = PortBlock.claim()
        self._passwords = {user: secrets.token_hex(12) for user in USERS}  # of Redis and S3
        self._secret = secrets.token_hex(16)
        self.stopping = False
        adopt_orphans()

    @property
    def engines(self) -> list[str]:
        """All nodes' names."""
        return [*self.nodes, REAL] if self.model else self.nodes

    def settings(self, **changes: object) -> Settings:
        """What the service runs with, straight to Redis and S3: for this process."""
        redis_port, s3_port = self._ports.ports[PORTS], self._ports.ports[0]
        return Settings.model_validate(
            {
                "redis_url": f"redis://ops:{self._passwords['ops']}@{HOST}:{redis_port}/0",
                "s3_endpoint": f"http://{HOST}:{s3_port}",
                "s3_bucket": "reelserve",
                "s3_access_key": "ops",
                "s3_secret_key": self._passwords["ops"],
                "secret_key": self._secret,
                "lease_seconds": LEASE_SECONDS,
                "sweep_seconds": SWEEP_SECONDS,
                "max_attempts": MAX_ATTEMPTS,
                **changes,
            }
        )

    async def start(self) -> None:
        """Everything up; raises TimeoutError when it does not come."""
        self._start_stores()
        direct = self.settings()
        await self._until(lambda: probes.redis_answers(direct), 30, "redis")
        storage = ObjectStore(direct)
        await self._until(lambda: probes.s3_takes_writes(storage), 60, "S3")
        keys = KeyStore(connect(direct), self._secret)
        self.api_keys = []
        secret = None
        for name in ("a", "b", "c"):
            _, plain, secret = keys.create(name, tuple(Scope), webhook_secret=secret)
            self.api_keys.append(plain)
        assert secret is not None
        self.receiver.secret = secret
        await self.receiver.start()
        self.s3 = S3Wire((HOST, self._ports.ports[0]), self.history)
        await self.s3.start()
        for who in (*ROLES, *self.engines):
            self.wires[who] = RedisWire(who, (HOST, self._ports.ports[PORTS]), self.history)
            await self.wires[who].start()
        self._start_roles()
        self._keeper = asyncio.create_task(self._keep())
        self.store = JobStore(connect(self.settings(redis_timeout=1.0)), direct)
        began = time.monotonic()
        await self._until(lambda: len(self.up()) == len(self.engines), 120, "the nodes")
        await self._until(lambda: probes.http_ok(f"{self.url}/readyz"), 60, "the API")
        self.history.add("note", what="up", seconds=time.monotonic() - began)

    @property
    def url(self) -> str:
        """The API."""
        return f"http://{HOST}:{self._ports.ports[PORTS + 1]}"

    def up(self) -> list[str]:
        """Nodes that asked for a job a moment ago."""
        now = time.monotonic()
        return [who for who in self.engines if now - self.wires[who].asked_at < UP_SECONDS]

    async def _keep(self) -> None:
        while not self.stopping:
            for part in self.parts.values():
                part.keep()
            await asyncio.sleep(0.1)

    async def _until(self, probe: Callable[[], bool], seconds: float, what: str) -> None:
        end = time.monotonic() + seconds
        while not await asyncio.to_thread(probe):
            if time.monotonic() > end:
                raise TimeoutError(f"{what} did not come up in {seconds:.0f} s; logs in {self.folder}")
            await asyncio.sleep(0.1)

    def _start_stores(self) -> None:
        env = dict(os.environ)
        redis_folder, weed_folder = self.folder / "redis", self.folder / "weed"
        ports = self._ports.ports
        self._add(redis_part(redis_folder, ports[PORTS], self._passwords, self.folder / "redis.log", env))
        self._add(weed_part(weed_folder, ports[:PORTS], self._passwords, self.folder / "weed.log", env))

    def _start_roles(self) -> None:
        shell = self.folder / "model"
        shell.mkdir(exist_ok=True)
        (shell / "models_t5_none.pth").touch()  # the chaos engine reads no checkpoint; `reel node` wants one
        self.runs.mkdir(exist_ok=True)
        self._add(reel("api", ["api"], self._env("api"), self.folder))
        self._add(reel("celery-worker", ["celery", "worker"], self._env("celery-worker"), self.folder))
        self._add(reel("celery-beat", ["celery", "beat"], self._env("celery-beat"), self.folder))
        for who in self.nodes:
            self._add(reel(who, ["node", "--model", str(shell)], self._node_env(who), self.folder))
        if self.model is not None:
            real = {
                **self._env(REAL), "REEL_NODE_ID": REAL, "REEL_NODE_RANKS": "2", "OMP_NUM_THREADS": "1",
                "REEL_WARM_UP": "false",  # its ranks die so often that they would do little else
            }  # fmt: skip
            self._add(reel(REAL, ["node", "--model", str(self.model)], real, self.folder))

    def _add(self, spec: PartSpec) -> None:
        part = Part(spec)
        self.parts[part.spec.name] = part
        part.start()

    def _env(self, who: str) -> dict[str, str]:
        wire, s3 = self.wires[who], f"http://{HOST}:{self.s3.port}"
        user = who.partition("-")[0] if who in ROLES else "node"
        values = {
            "REDIS_URL": f"redis://{user}:{self._passwords[user]}@{HOST}:{wire.port}/0",
            "REDIS_TIMEOUT": "3",
            "S3_ENDPOINT": s3,
            "S3_BUCKET": "reelserve",
            "S3_ACCESS_KEY": user,
            "S3_SECRET_KEY": self._passwords[user],
            "SECRET_KEY": self._secret,
            "API_PORT": str(self._ports.ports[PORTS + 1]),
            "ALLOW_LOOPBACK_CALLBACKS": "true",
            "LEASE_SECONDS": str(LEASE_SECONDS),
            "SWEEP_SECONDS": str(SWEEP_SECONDS),
            "MAX_ATTEMPTS": str(MAX_ATTEMPTS),
            "POLL_SECONDS": "0.5",
            "DRAIN_SECONDS": "0.5",
            "STEP_TIMEOUT_SECONDS": "6" if who != REAL else "15",
            "WEBHOOK_TIMEOUT_SECONDS": "2",
            "WEBHOOK_RETRY_SECONDS": "[0.5,1,1,2,2,2,2,2,2]",
            "WEBHOOK_PROGRESS_SECONDS": "1",
            "RATE_LIMIT": "100000",
            "DATA_DIR": str(self.folder / "data"),
            "LOG_LEVEL": "INFO",
        }
        plain = {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
        return {**os.environ, **plain, **{f"REEL_{name}": value for name, value in values.items()}}

    def _node_env(self, who: str) -> dict[str, str]:
        skew = self.skew_file(who)
        skew.write_text("0")
        return {
            **self._env(who),
            "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'chaos' / 'skew'}",
            "REEL_NODE_ID": who,
            "REEL_NODE_RANKS": "1",
            "REEL_SPOT_NOTICE": "gcp",
            "REEL_SPOT_NOTICE_ENDPOINT": self.receiver.url(f"/metadata/{who}"),
            "REEL_SPOT_GRACE_SECONDS": "0.5",
            "REEL_ENGINE": "tests.chaos.engine:build",
            "REEL_CHAOS_RUNS": str(self.runs),
            "REEL_CHAOS_SKEW": str(skew),
            "OMP_NUM_THREADS": "1",
        }

    def skew_file(self, who: str) -> Path:
        """Where a node's clock offset is read from."""
        return self.folder / f"{who}.skew"

    def heal(self) -> None:
        """End every fault that lasts."""
        for wire in self.wires.values():
            wire.up = True
            wire.traps.clear()
        self.s3.up, self.s3.faults, self.receiver.faults = True, [], []
        for part in self.parts.values():
            part.held = False
            part.thaw()

    def close(self) -> None:
        """Kill everything; remove the data unless it is wanted."""
        self.stopping = True
        kill_descendants()
        for path in sockets(self._ports.ports[:PORTS]):
            path.unlink(missing_ok=True)
        self._ports.release()
        for name in ("redis", "weed", "data", "model", "runs"):
            with contextlib.suppress(OSError):
                shutil.rmtree(self.folder / name)

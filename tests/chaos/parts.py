"""The service's real processes, by their real command lines, started again whenever they die."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from infra.process import PartSpec
from infra.reaper import die_with_parent

ROOT = Path(__file__).resolve().parents[2]
RESTART_SECONDS = 0.3


def reel(name: str, args: Iterable[str], env: dict[str, str], folder: Path) -> PartSpec:
    """A `reel` role."""
    argv = (sys.executable, "-m", "infra.cli", *args)
    return PartSpec(name, argv, env, folder / f"{name}.log", folder)


@dataclass
class Part:
    """One process. `held`: it is not to be started again yet."""

    spec: PartSpec
    process: "subprocess.Popen[bytes] | None" = None
    held: bool = False
    starts: int = 0
    frozen: bool = False
    _down_since: float = 0.0
    _stopped: list[psutil.Process] = field(default_factory=list)

    def start(self) -> None:
        """Start it; its output is appended to its log."""
        for path in self.spec.stale:
            path.unlink(missing_ok=True)
        with self.spec.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.spec.argv,
                env=dict(self.spec.env),
                cwd=self.spec.cwd,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=die_with_parent(os.getpid()),
            )
        self.starts += 1

    @property
    def pid(self) -> int:
        """Its process id; 0 while there is none."""
        return self.process.pid if self.process is not None and self.process.poll() is None else 0

    def keep(self) -> None:
        """Start it again when it has been dead for a moment."""
        if self.pid or self.held:
            self._down_since = 0.0
            return
        self._down_since = self._down_since or time.monotonic()
        if time.monotonic() - self._down_since > RESTART_SECONDS:
            self._down_since = 0.0
            self.start()

    def send(self, number: signal.Signals) -> bool:
        """A signal to the process itself; whether there was one."""
        if not self.pid:
            return False
        os.kill(self.pid, number)
        return True

    def family(self) -> list[psutil.Process]:
        """It and everything below it."""
        try:
            root = psutil.Process(self.pid) if self.pid else None
            return [root, *root.children(recursive=True)] if root else []
        except psutil.Error:
            return []

    def find(self, *titles: str) -> list[psutil.Process]:
        """Members of the family whose program or title is one of these."""
        found = []
        for process in self.family():
            with contextlib.suppress(psutil.Error):
                words = process.cmdline()
                # A busy actor's title is ray::RankActor.generate
                name = Path(words[0]).name.removeprefix("ray::").strip().split(".")[0] if words else ""
                if name in titles or any(title in words[:3] for title in titles):
                    found.append(process)
        return found

    def freeze(self) -> bool:
        """SIGSTOP the whole family, parents first, so that nobody restarts anybody."""
        self.frozen = True
        for process in self.family():
            with contextlib.suppress(psutil.Error):
                process.suspend()
                self._stopped.append(process)
        return bool(self._stopped)

    def thaw(self) -> None:
        """SIGCONT them."""
        for process in reversed(self._stopped):
            with contextlib.suppress(psutil.Error):
                process.resume()
        self._stopped = []
        self.frozen = False

    def kill_family(self) -> bool:
        """SIGKILL all of them at once, as a power cut does."""
        family = self.family()
        for process in family:
            with contextlib.suppress(psutil.Error):
                process.kill()
        self._stopped, self.frozen = [], False
        return bool(family)


def kill_one(processes: list[psutil.Process]) -> str | None:
    """SIGKILL the first; its title."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            process.kill()
            return Path(words[0]).name if words else str(process.pid)
    return None

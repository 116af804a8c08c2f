"""A `reel up` process for tests, started as a user would; all processes below it carry a mark of its own."""

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from infra.client import ReelClient
from tests.support.processes import marked

START_SECONDS = 240.0  # two busy cores; an idle machine takes about 20


class Stack:
    """Starts at once; `wait_ready` reads the ready line."""

    def __init__(self, data: Path, model: Path, *flags: str, **env: str) -> None:
        self.data = data
        self.mark = f"REEL_TEST_MARK={secrets.token_hex(8)}"
        name, value = self.mark.split("=")
        command = [sys.executable, "-m", "infra.cli", "up", "--port", "0", "--data", str(data)]
        self.said = data.with_suffix(".stderr")
        data.parent.mkdir(parents=True, exist_ok=True)
        with self.said.open("ab") as stderr:
            self.process = subprocess.Popen(
                [*command, "--model", str(model), *flags],
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env={**os.environ, name: value, **env},
                start_new_session=True,  # a test's own Ctrl-C is not the stack's
            )
        self.url = self.api_key = self.webhook_secret = ""

    def wait_ready(self) -> "Stack":
        """Read ``ready URL api-key KEY webhook-secret SECRET``."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        words = line.split()
        assert words[:1] == ["ready"], f"no ready line but {line!r}; it said:\n{self.said.read_text()}"
        assert words[2::2] == ["api-key", "webhook-secret"]
        self.url, self.api_key, self.webhook_secret = words[1::2]
        return self

    def client(self) -> ReelClient:
        """A client with the stack's own key."""
        return ReelClient(self.url, self.api_key)

    def supervisor(self) -> int:
        """The inner process: `reel up` itself is its guard."""
        return next(pid for pid in self.pids() if parent_of(pid) == self.process.pid)

    def pid_of(self, part: str) -> int:
        """The process of a part, by its command line."""
        word = {"redis": "redis-server", "celery-worker": "worker"}.get(part, part)
        supervisor = self.supervisor()
        for pid in self.pids():
            if parent_of(pid) == supervisor and any(Path(w).name.startswith(word) for w in command(pid)[:5]):
                return pid
        raise AssertionError(f"no process of {part}: {self.processes()}")

    def pids(self) -> list[int]:
        """All its processes."""
        return marked(self.mark, self.data)

    def processes(self) -> list[str]:
        """The command lines of all its processes."""
        return [f"{pid} {' '.join(command(pid))}" for pid in self.pids()]

    def interrupt(self, seconds: float = 60.0) -> int:
        """SIGINT, as Ctrl-C sends it; the exit code."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(seconds)

    def close(self) -> None:
        """End it, whatever state it is in."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


def command(pid: int) -> list[str]:
    """A process's command line; empty when it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    except OSError:
        return []


def parent_of(pid: int) -> int:
    """The parent's process id; 0 when it has ended."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def until(done: Callable[[], bool], seconds: float) -> bool:
    """Whether `done` becomes true within so many seconds."""
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True

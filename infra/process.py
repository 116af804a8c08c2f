"""One part of a local stack: a child process with its log file, its own process group and a stop deadline."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from infra.reaper import die_with_parent

LOG_KEEP_BYTES = 8 << 20  # a log larger than this at start is moved to .1
STABLE_SECONDS = 20.0  # alive for so long: the backoff starts over
BACKOFF_FIRST, BACKOFF_MAX = 0.5, 10.0  # seconds between a death and the next start


@dataclass(frozen=True)
class PartSpec:
    """How to run one part, and how to stop it.

    stop_order: parts of a lower number stop first; those of one number stop together.
    stop_signal: asks it to stop. stop_seconds: from then to SIGKILL.
    """

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    log: Path
    cwd: Path
    stop_order: int = 0
    stop_seconds: float = 10.0
    stop_signal: signal.Signals = signal.SIGTERM
    stale: tuple[Path, ...] = field(default=())  # sockets to remove before a start


class Part:
    """A running, restarting or stopped part. Not thread-safe: the supervisor's main thread owns it."""

    def __init__(self, spec: PartSpec) -> None:
        self.spec = spec
        self.deaths = 0
        self._failures = 0  # deaths in a row, each before STABLE_SECONDS
        self._process: subprocess.Popen[bytes] | None = None
        self._started = 0.0
        self._next_start = 0.0

    @property
    def pid(self) -> int | None:
        """The process id while there is a process."""
        return self._process.pid if self._process is not None else None

    def start(self) -> None:
        """Start the process; its output is appended to the log file."""
        spec = self.spec
        for path in spec.stale:
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            if spec.log.stat().st_size > LOG_KEEP_BYTES:
                spec.log.replace(spec.log.with_suffix(".log.1"))
        with spec.log.open("ab") as log:
            log.write(f"--- {time.strftime('%Y-%m-%dT%H:%M:%S')} {spec.name} starts\n".encode())
            log.flush()
            self._process = subprocess.Popen(
                spec.argv,
                env=dict(spec.env),
                cwd=spec.cwd,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C at the terminal is the supervisor's to handle
                preexec_fn=die_with_parent(os.getpid()),
            )
        self._started = time.monotonic()

    def died(self) -> int | None:
        """The exit status if the process has ended since the last call; plans the next start."""
        if self._process is None or (status := self._process.poll()) is None:
            return None
        self.kill_group()
        self._process = None
        self.deaths += 1
        lived = time.monotonic() - self._started
        self._failures = 0 if lived > STABLE_SECONDS else self._failures + 1
        backoff = min(BACKOFF_MAX, BACKOFF_FIRST * 2.0 ** max(0, self._failures - 1))
        self._next_start = time.monotonic() + backoff
        return status

    def restart_if_due(self) -> bool:
        """Start again when the backoff is over; whether it did."""
        if self._process is not None or time.monotonic() < self._next_start:
            return False
        self.start()
        return True

    def terminate(self) -> None:
        """Ask it to stop."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(self.spec.stop_signal)

    def stopped(self) -> bool:
        """Whether the process has ended or never ran."""
        return self._process is None or self._process.poll() is not None

    def kill_group(self) -> None:
        """SIGKILL whatever is left of its process group, and reap the process itself."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)

    def log_tail(self, lines: int = 12) -> str:
        """The last lines of its log since its latest start, indented."""
        try:
            text = self.spec.log.read_bytes()[-65536:].decode(errors="replace")
        except OSError:
            return "  (no log)"
        tail = text.rpartition(" starts\n")[2].splitlines()[-lines:]
        return "\n".join(f"  {line}" for line in tail) or "  (its log is empty)"


def describe_exit(status: int) -> str:
    """A Popen status in words."""
    if status >= 0:
        return f"exit code {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"

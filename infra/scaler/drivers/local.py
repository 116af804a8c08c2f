"""What the simulated cloud boots when it is tried on one machine: real `reel node` processes."""

import os
import signal
import subprocess
import sys
from pathlib import Path


class LocalNodes:
    """Each machine is one process group. They end with `stop_all`, or with SIGKILL when their machine is
    lost.
    """

    def __init__(self, model: Path, logs: Path) -> None:
        self._model = model
        self._logs = logs
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str) -> None:
        """Start `reel node` under the machine's name, with this process's settings."""
        self._logs.mkdir(parents=True, exist_ok=True)
        work = self._logs / name
        env = {**os.environ, "REEL_NODE_ID": name, "REEL_DATA_DIR": str(work)}
        argv = [sys.executable, "-m", "infra.cli", "node", "--model", str(self._model)]
        with (self._logs / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                argv, env=env, stdout=log, stderr=log, start_new_session=True
            )

    def stop(self, name: str) -> None:
        """As when a machine is switched off: no grace."""
        process = self._processes.pop(name, None)
        if process is not None:
            _kill(process, signal.SIGKILL)
            process.wait()

    def stop_all(self, seconds: float = 20.0) -> None:
        """The scaler ends: its nodes give back what they run and end too."""
        for process in self._processes.values():
            _kill(process, signal.SIGINT)
        for process in self._processes.values():
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                _kill(process, signal.SIGKILL)
                process.wait()
        self._processes.clear()


def _kill(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    if process.poll() is None:
        os.killpg(process.pid, number)

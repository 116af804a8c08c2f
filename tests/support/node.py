"""A real node in a process of its own, as `reel node` runs it, and what tests need to know of its family."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import psutil

from jobs.settings import Settings

T = TypeVar("T")
NODE = "from worker.serve import run_node; from jobs.settings import get_settings; from pathlib import Path; "


def until(probe: Callable[[], T | None], seconds: float, what: str) -> T:
    """The probe's first truthy answer within `seconds`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if answer := probe():
            return answer
        time.sleep(0.05)
    raise AssertionError(f"waited {seconds:.0f} s in vain for {what}")


def environment(settings: Settings) -> dict[str, str]:
    """The settings as REEL_* variables, for a child process."""
    values = {}
    for name in settings.model_fields_set:
        value = getattr(settings, name)
        secret = getattr(value, "get_secret_value", None)
        values[f"REEL_{name.upper()}"] = str(secret() if secret else value)
    return {**os.environ, **values, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


class NodeProcess:
    """One running `reel node`."""

    def __init__(self, settings: Settings, model: Path, log: Path) -> None:
        self.settings, self.log = settings, log
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    NODE + f"raise SystemExit(run_node(get_settings(), Path({str(model)!r})))",
                ],
                env=environment(settings),
                stdout=out,
                stderr=out,
            )
        self.root = psutil.Process(self.process.pid)
        self.seen: set[psutil.Process] = set()

    def family(self) -> list[psutil.Process]:
        """Every living descendant; remembered, to be asked for later."""
        found = self.root.children(recursive=True) if self.root.is_running() else []
        self.seen.update(found)
        return found

    def find(self, title: str) -> list[psutil.Process]:
        """Descendants whose command line begins with, or contains, `title`."""
        hits = []
        for process in self.family():
            try:
                if title in " ".join(process.cmdline()):
                    hits.append(process)
            except psutil.Error:
                continue
        return hits

    def ranks(self) -> list[psutil.Process]:
        """The rank actors' processes."""
        return self.find("ray::RankActor")

    def kill(self, title: str) -> None:
        """SIGKILL the one descendant with this title."""
        self.find(title)[0].send_signal(signal.SIGKILL)

    def leftovers(self, seconds: float = 10.0) -> list[psutil.Process]:
        """Processes of this node that still run after `seconds`."""
        _, alive = psutil.wait_procs(list(self.seen), timeout=seconds)
        return [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]

    def text(self) -> str:
        """The log so far."""
        return self.log.read_text(errors="replace")

    def end(self) -> None:
        """Stop at once, however it takes; leave nothing."""
        self.family()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        for process in self.leftovers():
            process.kill()


@contextmanager
def running_node(settings: Settings, model: Path, log: Path) -> Iterator[NodeProcess]:
    """A node that ends with the block."""
    node = NodeProcess(settings, model, log)
    try:
        yield node
    finally:
        node.end()

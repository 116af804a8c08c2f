"""`reel node`'s own process: starts the cluster's host, rebuilds it when it breaks, ends it on a signal.

It imports neither Ray nor torch, so that nothing in it can hang or crash with them.

    supervisor (this process, adopts orphans)
      host (`python -m worker.host`: Ray's driver)
        gcs_server, raylet ─ agents, node actor, rank actors ─ ffmpeg

The host's stdin is the leash: the plan goes down it first, then `drain`, `reclaim` or `stop`. Its end (the
supervisor died, by SIGKILL too) makes the host kill everything below it. If the host dies, its orphans come
here and are killed.
"""

import contextlib
import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import FrameType

from engine.compiled import keep_compiled
from worker.notice import Notice
from worker.plan import NodePlan, grace_seconds, ray_environment
from worker.processes import adopt_orphans, kill_descendants

EXIT_DONE = 0  # drained
EXIT_FATAL = 1  # the model or the settings are wrong: starting again would not help
EXIT_REBUILD = 75  # sysexits.h EX_TEMPFAIL: the cluster broke
HEALTHY_SECONDS = 60.0  # a cluster that lived this long starts the back-off anew
BACKOFF_SECONDS = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
LAST_SECONDS = 20.0  # on top of the drain's grace, before a host that does not end is killed
log = logging.getLogger(__name__)


class Supervisor:
    """Keeps one node's cluster running until told to stop."""

    def __init__(self, plan: NodePlan) -> None:
        self.plan = plan
        self._host: subprocess.Popen[bytes] | None = None
        self._asked: str | None = None  # None, or a word that worker.plan.grace_seconds knows, or "stop"
        self._asked_at = 0.0
        self._wake = threading.Event()

    def run(self) -> int:
        """Supervise until drained or fatally wrong; the process's exit code."""
        adopt_orphans()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        threading.Thread(target=_forward, args=(self.plan.log_pipe,), name="logs", daemon=True).start()
        settings = self.plan.settings
        if settings.spot_notice is not None:
            Notice(settings.spot_notice, settings.spot_notice_endpoint).watch(lambda: self._ask("reclaim"))
        try:
            return self._supervise()
        finally:
            kill_descendants()
            shutil.rmtree(self.plan.run_dir, ignore_errors=True)

    def _supervise(self) -> int:
        failures = 0
        while self._asked is None:
            started = time.monotonic()
            code = self._run_host()
            kill_descendants()
            if code in (EXIT_DONE, EXIT_FATAL):
                return code
            if self._asked is not None:
                break
            failures = 1 if time.monotonic() - started > HEALTHY_SECONDS else failures + 1
            delay = BACKOFF_SECONDS[min(failures, len(BACKOFF_SECONDS)) - 1]
            log.warning("cluster broke (host exit code %s): rebuilding it in %.1f s", code, delay)
            self._wake.wait(delay)
        return EXIT_DONE

    def _run_host(self) -> int:
        """Start a host and wait for its end; its exit code (negative: the signal that ended it)."""
        shutil.rmtree(self.plan.run_dir / "ray", ignore_errors=True)
        environment = os.environ | ray_environment()
        keep_compiled(self.plan.settings.data_dir.resolve() / "compiled", environment)
        with subprocess.Popen(
            [sys.executable, "-m", "worker.host"],
            stdin=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # a terminal's Ctrl-C is for the supervisor alone
        ) as self._host:
            assert self._host.stdin is not None
            try:
                pickle.dump(self.plan, self._host.stdin)
                self._host.stdin.flush()
            except BrokenPipeError:  # the host died before it had read the plan
                with contextlib.suppress(BrokenPipeError):
                    self._host.stdin.close()  # what is left in its buffer would be raised at the block's end
                return self._host.wait()
            if self._asked is not None:  # a signal that came while the host was being started
                self._tell(self._asked)
            while self._host.poll() is None:
                if self._asked is not None and time.monotonic() > self._deadline():
                    log.error("the host did not end in time: killing it")
                    self._host.kill()
                self._wake.wait(0.2)
                self._wake.clear()
            return self._host.returncode

    def _deadline(self) -> float:
        assert self._asked is not None
        return self._asked_at + grace_seconds(self._asked, self.plan.settings) + LAST_SECONDS

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """SIGTERM drains; SIGINT, or a second SIGTERM, gives back at once what runs."""
        self._ask("drain" if number == signal.SIGTERM and self._asked is None else "stop")

    def _ask(self, word: str) -> None:
        self._asked, self._asked_at = word, time.monotonic()
        self._tell(self._asked)
        self._wake.set()

    def _tell(self, word: str) -> None:
        if self._host is not None and self._host.stdin is not None and self._host.poll() is None:
            try:
                os.write(self._host.stdin.fileno(), f"{word}\n".encode())
            except OSError:
                log.debug("the host has already ended")


def _forward(pipe: Path) -> None:
    """Copy what the actors write into the FIFO to our stderr. Opened both ways, so it never sees an end."""
    source = os.open(pipe, os.O_RDWR)
    while data := os.read(source, 65_536):
        os.write(2, data)

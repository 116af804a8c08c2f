"""Sections of a benchmark in processes of their own: figures come over a pipe as they exist, and stay.

A section that raises, dies or takes too long loses only what it had not measured yet.
"""

import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any


def speak() -> Callable[[str, Any], None]:
    """The section's side: a function that sends one part's figures to the process that started it.

    They go to what was standard output; whatever else prints there goes to standard error from now on.
    """
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def emit(name: str, value: Any) -> None:
        print(json.dumps([name, value]), file=channel, flush=True)

    return emit


def run_section(
    command: Sequence[str],
    environment: Mapping[str, str],
    limit: float,
    on_part: Callable[[str, Any], None],
) -> str | None:
    """Run a section for `limit` seconds at the most; returns how it failed, None if it didn't.

    `on_part` hears of each part. Nothing that the section started outlives it.
    """
    late = threading.Event()
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, text=True, process_group=0
    ) as process:

        def stop() -> None:
            late.set()
            kill_group(process.pid)

        timer = threading.Timer(limit, stop)
        timer.start()
        try:
            for line in process.stdout or ():
                if line.endswith("\n"):  # else it was killed while it spoke
                    on_part(*json.loads(line))
            code = process.wait()
        finally:
            timer.cancel()
            kill_group(process.pid)
    if late.is_set():
        return f"stopped after {limit:.0f} s: its time was up"
    return f"its process ended with {code}" if code else None


def kill_group(group: int) -> None:
    """End every process of a group; none may be left."""
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a document so that a reader finds the old one or the new one, never half of one."""
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    beside.replace(path)

"""What a node's memory looks like from outside: GPUs by nvidia-smi, CPU ranks by their processes."""

import os
import shutil
import subprocess
from collections.abc import Iterable
from typing import NamedTuple

import psutil

from worker.plan import Device

TIMEOUT_SECONDS = 5.0  # nvidia-smi hangs when a GPU has fallen off its bus


class Memory(NamedTuple):
    """Bytes over all of a node's ranks."""

    used: int
    total: int


def read_memory(device: Device, processes: Iterable[psutil.Process]) -> Memory | None:
    """The node's memory now; None when it can't be told."""
    return _gpus() if device == "cuda" else _resident(processes)


def _gpus() -> Memory | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    only = [f"--id={chosen}"] if chosen else []
    query = ["--query-gpu=memory.used,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            [program, *only, *query], capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return parse_smi(done.stdout)


def parse_smi(text: str) -> Memory | None:
    """The sum over lines such as ``61234, 81559`` (MiB); None for anything else."""
    try:
        rows = [[int(part) for part in line.split(",")] for line in text.splitlines() if line.strip()]
    except ValueError:  # "[N/A]", on machines whose GPU shares the host's memory
        return None
    if not rows or any(len(row) != 2 for row in rows):
        return None
    return Memory(sum(row[0] for row in rows) * 2**20, sum(row[1] for row in rows) * 2**20)


def _resident(processes: Iterable[psutil.Process]) -> Memory | None:
    used = 0
    for process in processes:
        try:
            used += process.memory_info().rss
        except psutil.Error:
            continue
    return Memory(used, psutil.virtual_memory().total) if used else None

"""The ranks of a benchmark over several GPUs: one process each by torchrun, on a GPU of its own."""

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.run import main as torchrun

from engine.parallel.symmetric import keep_multicast_off


def start_ranks(module: str, gpus: int, words: Sequence[str]) -> bool:
    """Whether this process was no rank, so that it started them, and they have ended."""
    if "RANK" in os.environ:
        return False
    os.environ["BENCH_STARTED"] = str(time.time() - _age())
    torchrun(["--standalone", f"--nproc-per-node={gpus}", "-m", module, *words])
    return True


def _age() -> float:
    """Seconds since this process began: its imports took some of the time that is lent."""
    with suppress(OSError):  # not on Linux
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return float(Path("/proc/uptime").read_text().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")
    return 0.0


def started() -> float:
    """Unix time at which the ranks were started, for their budget; now where torchrun was called by hand."""
    return float(os.environ.get("BENCH_STARTED", time.time()))


def join_ranks(kind: str, timeout_seconds: float) -> torch.device:
    """Meet the other ranks: NCCL over "cuda", gloo over "cpu"; this rank's device."""
    device = torch.device(kind)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    keep_multicast_off()
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))
    return device

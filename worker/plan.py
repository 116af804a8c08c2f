"""What the supervisor tells the cluster it starts: everything that a node is, in one value."""

import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jobs.settings import Settings

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class NodePlan:
    """One node, fixed for the life of its supervisor (its clusters come and go)."""

    settings: Settings  # without secret_key: nodes neither check API keys nor sign webhooks
    model: Path  # checkpoint folder
    name: str | None  # the model's public name; None: what the checkpoint says
    node_id: str
    ranks: int
    device: Device
    threads: int  # CPU threads of torch, per rank
    run_dir: Path  # short-lived and short-named: sockets, the log pipe, the ranks' rendezvous files
    work_dir: Path  # videos being written and finished ones that are not yet committed; survives restarts

    @property
    def log_pipe(self) -> Path:
        """A FIFO that carries the actors' output to the supervisor's stderr."""
        return self.run_dir / "log"


def grace_seconds(word: str, settings: Settings) -> float:
    """How long what runs may go on, by what a node was asked: drain, reclaim (a spot notice) or stop."""
    return {"drain": settings.drain_seconds, "reclaim": settings.spot_grace_seconds}.get(word, 0.0)


def visible_gpus() -> int:
    """How many NVIDIA GPUs this process may use, without starting CUDA."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    present = len(list(Path("/dev").glob("nvidia[0-9]*")))
    if chosen is None:
        return present
    return min(present, len([part for part in chosen.split(",") if part.strip() not in ("", "-1")]))


def ranks_and_device(wanted: int) -> tuple[int, Device]:
    """The number of ranks and where they compute. `wanted` 0: one per visible GPU, or one on the CPU.

    Raises ValueError when more ranks are wanted than there are GPUs (and there are some).
    """
    gpus = visible_gpus()
    if gpus == 0:
        return max(wanted, 1), "cpu"
    if wanted > gpus:
        raise ValueError(
            f"REEL_NODE_RANKS is {wanted}, but {gpus} GPUs are visible; lower it or leave it at 0"
        )
    return wanted or gpus, "cuda"


def ray_environment() -> dict[str, str]:
    """What Ray reads from the environment, before it is imported; a fresh token for every cluster."""
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        # Every rank sees all GPUs and picks its own: symmetric memory needs distinct device numbers.
        "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",
        # The kernel, not Ray's monitor, decides on memory: others may share this machine's.
        "RAY_memory_monitor_refresh_ms": "0",
    }


def threads_per_rank(ranks: int) -> int:
    """OMP_NUM_THREADS if it is set, else an even share of the cores that this process may use."""
    chosen = os.environ.get("OMP_NUM_THREADS", "")
    if chosen.isdigit() and int(chosen) > 0:
        return int(chosen)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // ranks)


@dataclass(frozen=True)
class NodeStatus:
    """What the node actor tells its host."""

    state: Literal["starting", "serving", "draining", "stopped", "broken", "fatal"]
    detail: str = ""  # why it is broken or fatal, one line

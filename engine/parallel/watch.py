"""Notices a dead or hung rank within a bounded time, and ends this process if it can't get free of it.

Collectives on a CPU fail by themselves when a rank dies or stays away. A GPU that waits for a word from a
dead rank does not: so a thread of each rank looks at the others. All ranks are on one host, which is what a
node of this service is; on several hosts only the collectives' own time limits remain.
"""

import logging
import os
import select
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from engine.errors import RankLost

EXIT_CODE = 75  # EX_TEMPFAIL: made anew, the group will work again
GRACE_SECONDS = 5.0  # for the computing thread to fail by itself
FIRST_SECONDS = 600.0  # the first generation may compile kernels between two beats
LOOK_SECONDS = 0.25
PID, BEAT, STATE = range(3)  # columns of the board
IDLE, BUSY, LEFT = range(3)  # states
log = logging.getLogger(__name__)


class Watch:
    """One rank's view of all. Made by all ranks together; `limit` is the longest silence while computing."""

    def __init__(self, control: dist.ProcessGroup, limit: float) -> None:
        self.limit = limit
        self.rank, self.ranks = dist.get_rank(control), dist.get_world_size(control)
        self.lost = ""  # why the group is of no more use
        self._generations = 0
        self._board = _shared_board(control)
        self._board[self.rank, :] = os.getpid(), time.monotonic(), IDLE
        dist.barrier(group=control)
        self._processes = {
            os.pidfd_open(int(self._board[rank, PID])): rank
            for rank in range(self.ranks)
            if rank != self.rank
        }
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rank-watch", daemon=True)
        self._thread.start()

    def beat(self) -> None:
        """This rank's computing thread got on."""
        self._board[self.rank, BEAT] = time.monotonic()

    @contextmanager
    def working(self) -> Iterator[None]:
        """While the ranks compute together. Raises RankLost for whatever a lost rank makes of this one."""
        if self.lost:
            raise RankLost(self.lost)
        self.beat()
        self._board[self.rank, STATE] = BUSY
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            time.sleep(2 * LOOK_SECONDS)  # the connection may break before the process is seen to be dead
            if not self.lost and not _is_about_ranks(error):
                raise
            raise RankLost(self.lost or f"another rank failed or hangs: {error}") from error
        finally:
            self._board[self.rank, STATE] = IDLE
            self._generations += 1

    def close(self) -> None:
        """Stop looking; the others may see this process end."""
        self._board[self.rank, STATE] = LEFT
        self._stop.set()
        self._thread.join()
        for descriptor in self._processes:
            os.close(descriptor)
        self._processes = {}

    def _run(self) -> None:
        poll = select.poll()
        for descriptor in self._processes:
            poll.register(descriptor, select.POLLIN)
        while not self._stop.is_set():
            ended = [descriptor for descriptor, _ in poll.poll(LOOK_SECONDS * 1e3)]
            for descriptor in ended:
                poll.unregister(descriptor)
            deaths = [words for words in map(self._dead, ended) if words]
            self.lost = deaths[0] if deaths else self._silent()
            if self.lost:
                log.error("%s", self.lost)
                self._leave()
                return

    def _dead(self, descriptor: int) -> str:
        rank = self._processes[descriptor]
        if self._board[rank, STATE] == LEFT:
            return ""
        return f"rank {rank} (process {self._board[rank, PID]:.0f}) died"

    def _silent(self) -> str:
        """The rank that fell silent first, if that is too long ago: the others wait for it."""
        limit = self.limit if self._generations else max(self.limit, FIRST_SECONDS)
        busy = [rank for rank in range(self.ranks) if self._board[rank, STATE] == BUSY]
        rank = min(busy, key=lambda rank: self._board[rank, BEAT], default=self.rank)
        silence = time.monotonic() - self._board[rank, BEAT]
        if not busy or silence <= limit:
            return ""
        pid = self._board[rank, PID]
        return f"rank {rank} (process {pid:.0f}) did nothing for {silence:.0f} s: it hangs"

    def _leave(self) -> None:
        """Let the computing thread fail by itself; if it can't, this process must not go on holding a GPU."""
        deadline = time.monotonic() + GRACE_SECONDS
        while self._board[self.rank, STATE] == BUSY and not self._stop.is_set():
            if time.monotonic() > deadline:
                log.error("rank %d waits for a lost rank and can't stop: its process ends", self.rank)
                os._exit(EXIT_CODE)
            time.sleep(LOOK_SECONDS)


def watch_ranks(control: dist.ProcessGroup, limit: float) -> Watch | None:
    """A watch, where all ranks are on one host that lets processes be watched; a collective call."""
    here = os.uname().nodename if hasattr(os, "pidfd_open") else ""
    hosts: list[str] = [""] * dist.get_world_size(control)
    dist.all_gather_object(hosts, here, group=control)
    if not here or len(set(hosts)) > 1:
        log.warning("ranks on %s aren't watched: only collectives' time limits notice a loss", set(hosts))
        return None
    return Watch(control, limit)


def _shared_board(control: dist.ProcessGroup) -> np.ndarray:
    """[ranks, 3] fp64 in memory that all ranks share; its file is gone once all have it."""
    shape = (dist.get_world_size(control), 3)
    box: list[str] = [""]
    if dist.get_rank(control) == 0:
        handle, box[0] = tempfile.mkstemp(prefix="reel-watch-")
        os.truncate(handle, 8 * shape[0] * shape[1])
        os.close(handle)
    dist.broadcast_object_list(box, group=control, group_src=0)
    board = np.memmap(box[0], dtype=np.float64, mode="r+", shape=shape)
    dist.barrier(group=control)
    if dist.get_rank(control) == 0:
        Path(box[0]).unlink()
    return board


def _is_about_ranks(error: RuntimeError) -> bool:
    """Whether a collective failed, rather than the computation."""
    words = str(error)
    return isinstance(error, dist.DistError) or "gloo" in words or "NCCL" in words

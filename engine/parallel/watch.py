"""Notices a rank that died, hangs or gave up in bounded time; ends this process if it can't get free of it.

Collectives on a CPU fail by themselves when a rank dies or stays away. A GPU that waits for a word from a
dead rank does not: so a thread of each rank looks at the others. A rank that an error of its own takes out
of a video (its memory is full, say) is lost to the others too: where they are in the order of collectives
it isn't, and what they sent to it would be taken for the next video's. So all of them refuse further work,
and whoever owns the ranks makes the group anew. All ranks are on one host, which is what a
node of this service is; on several hosts only the collectives' own time limits remain.
"""

import logging
import os
import select
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from engine.config import Canceled
from engine.errors import RankLost, RequestError
from engine.out_of_memory import is_out_of_memory

EXIT_CODE = 75  # EX_TEMPFAIL: made anew, the group will work again
GRACE_SECONDS = 5.0  # for the computing thread to fail by itself
FIRST_SECONDS = 600.0  # the first generation may compile kernels between two beats
LOOK_SECONDS = 0.25
PID, BEAT, STATE = range(3)  # columns of the board
IDLE, BUSY, LEFT, FULL, FAILED = range(5)  # states
GAVE_UP = {FULL: "ran out of memory in the midst of a video", FAILED: "failed in the midst of a video"}
log = logging.getLogger(__name__)


class Watch:
    """One rank's view of all. Made by all ranks together; `limit` is the longest silence while computing."""

    def __init__(
        self, control: dist.ProcessGroup, limit: float, device: torch.device = torch.device("cpu")
    ) -> None:
        self.limit, self._device = limit, device
        self._marks: deque[torch.cuda.Event] = deque()  # that the GPU has yet to reach, in order
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

    def pulse(self) -> None:
        """A beat when the GPU gets to here: the thread that queues its work may be a whole step ahead."""
        if self._device.type != "cuda":
            self.beat()
            return
        mark = torch.cuda.Event()  # type: ignore[no-untyped-call]
        mark.record(torch.cuda.current_stream(self._device))
        self._marks.append(mark)

    @contextmanager
    def working(self) -> Iterator[None]:
        """While the ranks compute together. Raises RankLost for whatever a lost rank makes of this one.

        What ends the work on all ranks alike (Canceled, RequestError) leaves the group whole.
        """
        if self.lost:
            raise RankLost(self.lost)
        self.beat()
        self._board[self.rank, STATE] = BUSY
        state = IDLE
        try:
            yield
        except (Canceled, RequestError):
            raise
        except RankLost as error:
            self.lost = self.lost or str(error)
            raise
        except BaseException as error:
            full = is_out_of_memory(error)
            if isinstance(error, RuntimeError) and not full:
                time.sleep(2 * LOOK_SECONDS)  # a connection may break before the process is seen to be dead
                if self.lost or _is_about_ranks(error):
                    self.lost = self.lost or f"another rank failed or hangs: {error}"
                    raise RankLost(self.lost) from error
            state = FULL if full else FAILED
            self.lost = self.lost or f"rank {self.rank} {GAVE_UP[state]}"
            raise
        finally:
            self._board[self.rank, STATE] = state
            self._generations += 1

    def close(self) -> None:
        """Stop looking; the others may see this process end."""
        if self._board[self.rank, STATE] not in GAVE_UP:
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
            self._count_marks()
            ended = [descriptor for descriptor, _ in poll.poll(LOOK_SECONDS * 1e3)]
            for descriptor in ended:
                poll.unregister(descriptor)
            deaths = [words for words in map(self._dead, ended) if words]
            found = self._gave_up() or (deaths[0] if deaths else self._silent())
            if found or self.lost:  # the computing thread may have set it
                self.lost = self.lost or found
                log.error("%s", self.lost)
                self._leave()
                return

    def _count_marks(self) -> None:
        """Beat if the GPU got on."""
        reached = False
        try:
            while self._marks and self._marks[0].query():  # type: ignore[no-untyped-call]
                self._marks.popleft()
                reached = True
        except RuntimeError:  # a failed kernel, which the computing thread is about to hear of
            self._marks.clear()
        if reached:
            self.beat()

    def _dead(self, descriptor: int) -> str:
        rank = self._processes[descriptor]
        if self._board[rank, STATE] == LEFT:
            return ""
        return f"rank {rank} (process {self._board[rank, PID]:.0f}) died"

    def _gave_up(self) -> str:
        """Which other rank left the work by an error of its own."""
        for rank in range(self.ranks):
            words = GAVE_UP.get(int(self._board[rank, STATE]))
            if words is not None and rank != self.rank:
                return f"rank {rank} {words}"
        return ""

    def _silent(self) -> str:
        """The rank that fell silent first, if nobody has got on for too long: the others wait for it.

        While any rank gets on, those that wait for it are no worse for it; a rank that hangs stops them all
        within a step.
        """
        limit = self.limit if self._generations else max(self.limit, FIRST_SECONDS)
        busy = [rank for rank in range(self.ranks) if self._board[rank, STATE] == BUSY]
        rank = min(busy, key=lambda rank: self._board[rank, BEAT], default=self.rank)
        now = time.monotonic()
        if not busy or now - max(self._board[one, BEAT] for one in busy) <= limit:
            return ""
        silence = now - self._board[rank, BEAT]
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


def watch_ranks(control: dist.ProcessGroup, limit: float, device: torch.device) -> Watch | None:
    """A watch, where all ranks are on one host that lets processes be watched; a collective call."""
    here = os.uname().nodename if hasattr(os, "pidfd_open") else ""
    hosts: list[str] = [""] * dist.get_world_size(control)
    dist.all_gather_object(hosts, here, group=control)
    if not here or len(set(hosts)) > 1:
        log.warning("ranks on %s aren't watched: only collectives' time limits notice a loss", set(hosts))
        return None
    return Watch(control, limit, device)


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

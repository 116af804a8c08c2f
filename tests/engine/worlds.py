"""Real ranks over gloo: `python -m tests.engine.worlds CHECKPOINT FOLDER`.

One process imports everything and then forks the ranks of one world after another: 2, 4 and 8, and worlds
that lose a rank. What the ranks find goes into files that the tests read.
"""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from tests.engine.lost_ranks import FULL, LOSSES, fill_up, lose_rank
from tests.engine.ranks import LAYOUTS, run_world


def fork_ranks(folder: Path, count: int, body: Callable[[int], None], seconds: float) -> None:
    """Run `body(rank)` in `count` forks; exit codes (signals negative) and times go to `folder/codes`."""
    folder.mkdir()
    ranks: dict[int, int] = {}
    for rank in range(count):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                body(rank)
                code = 0
            except BaseException:
                with (folder / "words").open("a") as words:
                    words.write(f"rank {rank}:\n{traceback.format_exc()}\n")
            os._exit(code)
        ranks[child] = rank
    codes: dict[int, str] = {}
    deadline = time.monotonic() + seconds
    while len(codes) < count:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            at = time.monotonic()
            codes[ranks.pop(child)] = f"{os.waitstatus_to_exitcode(status)} {at}"
        elif time.monotonic() > deadline:
            for child in ranks:
                os.kill(child, signal.SIGKILL)
        else:
            time.sleep(0.02)
    (folder / "codes").write_text("\n".join(codes[rank] for rank in range(count)))


def main(checkpoint: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    for world in LAYOUTS:
        place = folder / str(world)
        fork_ranks(place, world, lambda rank, w=world, p=place: run_world(rank, w, p, checkpoint), 120)
    for loss in LOSSES:
        place = folder / loss
        fork_ranks(place, 4, lambda rank, x=loss, p=place: lose_rank(x, rank, p, checkpoint), 60)
    fork_ranks(folder / FULL, 2, lambda rank: fill_up(rank, folder / FULL, checkpoint), 60)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

"""The figures of a benchmark over several ranks: written as they come, gone on with later, within a time."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks._sections import write_json
from benchmarks._together import shared


def check_place(path: Path | None, resume: bool) -> None:
    """Before anything is begun: no figures of an earlier run are lost. Exits, saying what to do."""
    if path is None:
        return
    if path.exists() and not resume:
        sys.exit(f"{path} is there already: --resume goes on with it; or name another file by --json")
    path.parent.mkdir(parents=True, exist_ok=True)


class Book:
    """The figures so far, and the time that is left. Rank 0 alone writes and speaks."""

    def __init__(self, path: Path | None, resume: bool, budget: float, started: float) -> None:
        self.path, self._end = path, started + budget
        self.data: dict[str, Any] = {"steps": {}}
        if resume and path is not None and path.exists():
            self.data = json.loads(path.read_text())
        self.data.pop("postponed", None)  # it is this run's to say

    def begin(self, **facts: Any) -> None:
        """What the figures are of. Raises ValueError where the file to go on with is of something else."""
        for name, value in facts.items():
            if self.data.get(name, value) != value:
                raise ValueError(
                    f"{self.path} has figures of {name} {self.data[name]}, this run is of {value}: "
                    "repeat the arguments of the run that wrote it, or name another file by --json"
                )
        self.write(**facts)

    def left(self, seconds: float, device: torch.device) -> bool:
        """Whether so many seconds are left, by the ranks' agreement."""
        return shared(float(time.time() + seconds < self._end), device, dist.ReduceOp.MIN) > 0

    def postpone(self, name: str) -> None:
        """There is no time for this part: say so here and in the file, which then isn't whole."""
        self.write(postponed=[*self.data.get("postponed", []), name])
        self.say(f"no time left for {name}; run again with --resume")

    def write(self, **figures: Any) -> None:
        """Add and save."""
        self.data |= figures
        if dist.get_rank() == 0 and self.path is not None:
            write_json(self.path, self.data)

    def say(self, words: str) -> None:
        """On stderr, at once."""
        if dist.get_rank() == 0:
            print(words, file=sys.stderr, flush=True)

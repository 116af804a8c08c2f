"""Several `reel run`s in the ranks of one torchrun: `-m tests.engine.run_ranks CASES.json`.

Starting ranks takes far longer than a tiny video, so that they stay joined from one to the next. All else is
as the command does it.
"""

import json
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from infra.cli import invoke


def main(cases: Path) -> None:
    """Each case is the command's arguments; the first that fails ends all."""
    torch.set_num_threads(1)
    with mock.patch.object(dist, "destroy_process_group"):
        for arguments in json.loads(cases.read_text()):
            code = invoke(["run", *arguments])
            if code:
                sys.exit(code)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

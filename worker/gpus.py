"""How busy the node's GPUs are and how full their memory is, by nvidia-smi, which comes with the driver."""

import logging
import os
import subprocess

from jobs.nodes import GpuUse

TIMEOUT = 20.0  # seconds: nvidia-smi hangs when a GPU has fallen off its bus
FIELDS = "index,utilization.gpu,memory.used,memory.total"
MIB = 1 << 20
log = logging.getLogger(__name__)


class GpuMeter:
    """Asks the driver, which may take seconds: not in a thread that others wait for.

    Only for the GPUs that this process may use. `latest` is empty until the first sample, and where there is
    no such program, which is said once.
    """

    def __init__(self, program: str = "nvidia-smi") -> None:
        self._program = program
        self._missing = False
        self.latest: list[GpuUse] = []

    def sample(self) -> bool:
        """Take one sample into `latest`; False when there is no such program and there will be none."""
        if self._missing:
            return False
        chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
        only = [f"--id={chosen}"] if chosen else []
        argv = [self._program, *only, f"--query-gpu={FIELDS}", "--format=csv,noheader,nounits"]
        try:
            done = subprocess.run(argv, capture_output=True, text=True, timeout=TIMEOUT, check=True)
            self.latest = [parse(line) for line in done.stdout.splitlines() if line.strip()]
        except FileNotFoundError:
            log.warning("no %s here: the GPUs' load is not reported", self._program)
            self._missing = True
            return False
        except (subprocess.SubprocessError, ValueError) as error:
            log.warning("the GPUs' load is not known: %s", error)
            self.latest = []
        return True


def parse(line: str) -> GpuUse:
    """One line such as ``3, 97, 71234, 81559`` (percent, MiB). Raises ValueError."""
    words = [word.strip() for word in line.split(",")]
    if len(words) != 4:
        raise ValueError(f"nvidia-smi: got {line!r}, expected {FIELDS}")
    index, busy, used, total = (float(word) for word in words)
    return GpuUse(
        index=int(index), busy=busy / 100, memory_used=int(used * MIB), memory_total=int(total * MIB)
    )

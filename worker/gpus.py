"""How busy the node's GPUs are and how full their memory is, by nvidia-smi, which comes with the driver."""

import logging
import subprocess
import threading

from jobs.nodes import GpuUse

SECONDS = 10.0  # between samples; one costs a fraction of a second of CPU
TIMEOUT = 20.0
FIELDS = "index,utilization.gpu,memory.used,memory.total"
MIB = 1 << 20
log = logging.getLogger(__name__)


class GpuMeter:
    """Samples in a thread of its own, so that a slow driver delays nothing. `latest` is empty until then."""

    def __init__(self, program: str = "nvidia-smi") -> None:
        self._program = program
        self.latest: list[GpuUse] = []

    def start(self) -> None:
        """Begin, for the life of the process."""
        threading.Thread(target=self._run, name="gpus", daemon=True).start()

    def _run(self) -> None:
        pause = threading.Event()
        while self.sample():
            pause.wait(SECONDS)

    def sample(self) -> bool:
        """Take one sample; False when there is no such program and there will be none."""
        argv = [self._program, f"--query-gpu={FIELDS}", "--format=csv,noheader,nounits"]
        try:
            done = subprocess.run(argv, capture_output=True, text=True, timeout=TIMEOUT, check=True)
            self.latest = [parse(line) for line in done.stdout.splitlines() if line.strip()]
        except FileNotFoundError:
            log.warning("no %s here: the GPUs' load is not reported", self._program)
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

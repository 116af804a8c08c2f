"""What happened, one JSON object a line, in the order in which this process saw it.

Kinds (`k`), each with `t`, the wall clock in seconds (t0: when it began):
  submit   a POST /v1/jobs: t0, idem, seed, prompt, st (status) or err, id, retry_after
  cancel   a POST .../cancel: t0, id, st, state (the job's, before the answer: unknown), retry_after
  view     a GET of a job: id, st, state, version
  call     a job script over the wire: t0, who, s (script), job, token, r (first word of the reply), extra
  put      an object's upload: who, key, st
  hook     a webhook at the receiver: id, job, type, path, st (ours), sha (of the body), ok (signature)
  fault    a fault that took effect: fault, and what it hit
  note     anything else worth keeping
"""

import json
import time
from pathlib import Path
from typing import Any


class History:
    """Appends to a file, and keeps everything in memory for the run's own use."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", buffering=1 << 16)
        self.counts: dict[str, int] = {}  # faults by kind

    def add(self, kind: str, **fields: Any) -> None:
        """One record, stamped now."""
        self._file.write(json.dumps({"k": kind, "t": time.time(), **fields}) + "\n")

    def fault(self, name: str, **fields: Any) -> None:
        """A fault took effect."""
        self.counts[name] = self.counts.get(name, 0) + 1
        self.add("fault", fault=name, **fields)

    def close(self) -> None:
        """Flush to disk."""
        self._file.close()


def read_history(path: Path) -> list[dict[str, Any]]:
    """Every record."""
    return [json.loads(line) for line in path.read_text().splitlines()]

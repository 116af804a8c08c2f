"""Progress, cancellation and wall time of one generation, agreed on over the ranks."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from engine.config import CancelCheck, Canceled, Progress, ProgressCallback
from engine.parallel.mesh import Mesh

Phase = Literal["encoding", "denoising", "decoding"]


class Tracker:
    """Follows one generation. Only rank 0 calls back; its answer to "cancel?" reaches every rank."""

    def __init__(
        self,
        mesh: Mesh,
        device: torch.device,
        on_progress: ProgressCallback | None = None,
        should_cancel: CancelCheck | None = None,
    ) -> None:
        self.mesh, self.device = mesh, device
        self.on_progress, self.should_cancel = on_progress, should_cancel
        self.seconds: dict[str, float] = {}
        self.where = "the start"

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Time a phase, to the end of the device's work."""
        start = time.perf_counter()
        if name == "encoding":
            self.report(name, 0, 1)
        yield
        if name == "encoding":
            self.report(name, 1, 1)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[name] = time.perf_counter() - start

    def report(self, phase: Phase, step: int, steps: int) -> None:
        """A step boundary: tell the progress, and raise Canceled on all ranks if rank 0 is asked to stop."""
        self.mesh.beat()
        self.where = f"{phase}, step {step} of {steps}"
        if self.mesh.rank == 0 and self.on_progress is not None:
            self.on_progress(Progress(phase, step, steps))
        cancel = self.mesh.rank == 0 and self.should_cancel is not None and self.should_cancel()
        if self.mesh.agree(cancel):
            raise Canceled(f"canceled at {self.where}")

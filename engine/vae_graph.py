"""The decoder's chunk, once recorded as a CUDA graph and replayed, also for the videos to come.

Every latent frame but the first is decoded by the same kernels on the same shapes, and what the layers
remember stays in its place. Where a rank holds a stripe of each frame, those kernels are small and hundreds
of exchanges with the neighbours lie between them: the host can't launch them as fast as the GPU is done with
them. A replay launches them all at once.

Shapes: B batch, C channels, T frames, H rows, W columns.
"""

import torch
from torch import Tensor

from engine.vae_fused import FusedDecoder

# Of the first video. Its first latent frame has shapes of its own; the second makes what the layers remember;
# the third compiles what only then has both: a recording must find all compiled, chosen and allocated.
BEFORE = 3


class RecordedDecoder:
    """A `FusedDecoder` whose latent frames but the first are replayed."""

    def __init__(self, fused: FusedDecoder) -> None:
        self.fused, self.space = fused, fused.space
        self._seen = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def restart(self) -> None:
        """Another video begins."""
        self.fused.restart()
        self._seen = 0

    def frames(self, z_BC1HW: Tensor) -> Tensor:
        """As `FusedDecoder.frames`."""
        self._seen += 1
        if self._seen == 1 or (self._graph is None and self._seen <= BEFORE):
            return self.fused.frames(z_BC1HW)
        if self._graph is None:
            self._z_BC1HW = z_BC1HW.clone()  # in the order of memory that the first layer has seen
            graph = torch.cuda.CUDAGraph()
            # Other threads (NCCL's watchdog, the frame writer) may go on calling CUDA meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._frames_BCTHW = self.fused.frames(self._z_BC1HW)
            self._graph = graph
        self._z_BC1HW.copy_(z_BC1HW)
        self._graph.replay()
        return self._frames_BCTHW.clone()  # the next replay writes there


class Recordings:
    """The recording of the shape that was decoded last.

    A graph holds on to its communicator: forget the recordings before the process group is destroyed.
    """

    def __init__(self) -> None:
        self._shape: tuple[object, ...] = ()
        self._kept: RecordedDecoder | None = None

    def of(self, fused: FusedDecoder, z_BCFHW: Tensor) -> RecordedDecoder:
        """A recording for such latents, at its start: the one that is there, or a new one of `fused`."""
        b, c, _, h, w = z_BCFHW.shape
        shape = (b, c, h, w, z_BCFHW.dtype, fused.space.division)
        if self._kept is None or shape != self._shape:
            self._kept = None  # its memory goes before the next one's comes
            self._shape, self._kept = shape, RecordedDecoder(fused)
        else:
            self._kept.restart()
        return self._kept

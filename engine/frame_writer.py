"""Frames to their sink in a thread, in order, so that the decoder never waits for the encoder of the MP4."""

import queue
import threading
from collections.abc import Callable
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from engine.config import FrameSink

BEAT_SECONDS = 1.0
AHEAD = 2  # chunks that may be queued on the GPU before the first must be done: progress stays true


class FrameWriter:
    """Give it chunks, in a `with`: at its end all are written. An error of the sink is raised again here.

    `beat` is called while it waits for the sink, so that nobody takes the wait for a hang.
    """

    def __init__(self, sink: FrameSink, beat: Callable[[], None] = lambda: None) -> None:
        self._sink, self._beat = sink, beat
        self._queue: queue.Queue[tuple[np.ndarray, torch.cuda.Event | None] | None] = queue.Queue()
        self._error: BaseException | None = None
        self._drop = threading.Event()
        self._copies: list[torch.cuda.Event] = []
        self._thread = threading.Thread(target=self._run, name="frames", daemon=True)
        self._thread.start()

    def write(self, frames_THW3: Tensor) -> None:
        """Queue uint8 RGB frames; their way off the GPU is queued behind what makes them."""
        self._check()
        if not frames_THW3.is_cuda:
            self._queue.put((frames_THW3.contiguous().numpy(), None))
            return
        host = torch.empty(frames_THW3.shape, dtype=torch.uint8, pin_memory=True)
        host.copy_(frames_THW3, non_blocking=True)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record()
        self._queue.put((host.numpy(), copied))
        self._copies.append(copied)
        if len(self._copies) > AHEAD:
            self._copies.pop(0).synchronize()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            frames, copied = item
            if self._drop.is_set():
                continue
            try:
                if copied is not None:
                    copied.synchronize()
                self._sink.write(frames)
            except BaseException as error:  # told to the computing thread, which ends the video
                self._error = error
                self._drop.set()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def __enter__(self) -> "FrameWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._drop.set()  # canceled or failed: what is queued is of no use
        self._queue.put(None)
        while self._thread.is_alive():
            self._beat()
            self._thread.join(BEAT_SECONDS)
        if kind is None:
            self._check()

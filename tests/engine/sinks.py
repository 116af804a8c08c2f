import numpy as np


class Frames:
    """A FrameSink that keeps everything."""

    def __init__(self) -> None:
        self.chunks: list[np.ndarray] = []

    def write(self, frames: np.ndarray) -> None:
        self.chunks.append(frames)

    @property
    def video(self) -> np.ndarray:
        """[frames, height, width, 3] uint8."""
        return np.concatenate(self.chunks)

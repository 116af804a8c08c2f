"""Keeps a video in memory where nothing is to be written to a file."""

import numpy as np
import torch
from torch import Tensor

from engine.config import FrameSink


class Frames(FrameSink):
    """A sink that keeps what it is given."""

    def __init__(self) -> None:
        self.parts: list[np.ndarray] = []

    def write(self, frames: np.ndarray) -> None:
        """Take [T, H, W, 3] uint8."""
        self.parts.append(frames)

    def array(self) -> np.ndarray:
        """[F, H, W, 3] uint8."""
        return np.concatenate(self.parts)

    def video(self) -> Tensor:
        """[1, 3, F, H, W] in [-1, 1]."""
        return torch.from_numpy(self.array()).permute(3, 0, 1, 2)[None].float() / 127.5 - 1

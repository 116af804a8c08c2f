"""A training step recorded once as a CUDA graph and replayed: small models wait for launches otherwise."""

from collections.abc import Callable

import torch
from torch import Tensor

Learn = Callable[[], dict[str, Tensor]]


def record(learn: Learn, optimizer: torch.optim.Optimizer) -> Learn:
    """Replays `learn`, which must find its inputs at fixed places and read nothing back from the GPU.

    Three steps are made before the recording, so that compilers and algorithm searches are done.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            learn()
    torch.cuda.current_stream().wait_stream(side)
    optimizer.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        losses = learn()

    def replay() -> dict[str, Tensor]:
        graph.replay()
        return losses

    return replay

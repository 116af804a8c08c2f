import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine.load import load_pipeline
from engine.pipeline import Pipeline
from engine.tiny import make_tiny


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny tensors: threads only wait for one another, and other suites use the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    """Random numbers from a seed that a failing test prints."""
    seed = random.randrange(2**31)
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint; read only."""
    return make_tiny(tmp_path_factory.mktemp("tiny"), seed=1)


@pytest.fixture(scope="session")
def pipeline(tiny: Path) -> Pipeline:
    """The tiny checkpoint, loaded on the CPU."""
    return load_pipeline(tiny, device="cpu")

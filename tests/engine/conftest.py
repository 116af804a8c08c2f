import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from PIL import Image

from engine.config import Task
from engine.load import load_pipeline
from engine.pipeline import Pipeline
from engine.tiny import make_tiny
from tests.engine.checkpoints import write_image_model
from tests.support import threads


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny tensors: threads only wait for one another, and other suites use the cores."""
    with threads.one_thread():
        yield


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
def image_models(tmp_path_factory: pytest.TempPathFactory) -> dict[Task, Path]:
    """Tiny I2V and TI2V checkpoints; read only."""
    generator = torch.Generator().manual_seed(1)
    folder = tmp_path_factory.mktemp("image-models")
    tasks: tuple[Task, ...] = ("i2v", "ti2v")
    return {task: write_image_model(folder / task, task, generator) for task in tasks}


@pytest.fixture(scope="session")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 4:3 picture; at the tiny I2V model's 64*80 and 9 frames it gives 3 x 3 x 5 = 45 tokens: odd."""
    path = tmp_path_factory.mktemp("picture") / "image.png"
    Image.new("RGB", (64, 48), (250, 10, 10)).save(path)
    return path


@pytest.fixture(scope="session")
def pipeline(tiny: Path) -> Pipeline:
    """The tiny checkpoint, loaded on the CPU."""
    return load_pipeline(tiny, device="cpu")


@pytest.fixture
def world_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dist.ProcessGroup]:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    group = dist.group.WORLD
    assert group is not None
    yield group
    dist.destroy_process_group()

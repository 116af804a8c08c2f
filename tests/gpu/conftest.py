"""Everything in this folder is marked `gpu`, and needs one."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seeds torch, and prints the seed so that a failure can be repeated."""
    value = int(os.environ.get("REEL_TEST_SEED", "0")) or int.from_bytes(os.urandom(3), "big")
    print(f"seed {value}: repeat with REEL_TEST_SEED={value}")
    torch.manual_seed(value)
    return value

"""Kernels run on the GPU where there is one, else under Triton's interpreter on the CPU.

The switch is set in tests/conftest.py, before anything imports triton.
"""

import os
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from tests.kernels.interpreter import round_like_hardware

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def device() -> torch.device:
    return DEVICE


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """Seeds torch, and prints the seed so that a failure can be repeated."""
    value = int(os.environ.get("REEL_TEST_SEED", "0")) or int.from_bytes(os.urandom(3), "big")
    print(f"seed {value}: repeat with REEL_TEST_SEED={value}")
    torch.manual_seed(value)
    return value


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh memory is full of NaN, so a value that a kernel leaves unwritten can't pass for a result."""
    with torch.device("cpu"):  # torch notes once which functions a device context concerns: the real ones
        torch.empty(0)
    empty, empty_like = torch.empty, torch.empty_like

    def poison(out: torch.Tensor) -> torch.Tensor:
        return out.fill_(float("nan")) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def hardware_arithmetic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Under the interpreter, bf16 rounds and floats overflow to infinity as on a GPU."""
    if DEVICE.type == "cpu":
        round_like_hardware(monkeypatch)
    with np.errstate(over="ignore", invalid="ignore"):
        yield

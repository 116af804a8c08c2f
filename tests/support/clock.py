"""Another clock for one module: the process's own is shared with event loops and servers in other threads."""

import time
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest


def set_clock(monkeypatch: pytest.MonkeyPatch, module: ModuleType, **functions: Callable[..., Any]) -> None:
    """Let `module` see these functions instead of `time`'s of the same names, and nobody else."""
    monkeypatch.setattr(module, "time", SimpleNamespace(**{**vars(time), **functions}))

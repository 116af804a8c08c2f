"""Tuning tables: what was measured fastest on a GPU, by operation and shape.

A table is `kernels/tuned/<GPU name>.json`:
{"device": ..., "measured": ..., "ops": {operation: {key: settings}}}.
A GPU without one takes that of a card with the same chip (`SIBLINGS`), else the defaults that each operation
names, after one warning.
"""

import fcntl
import json
import os
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent / "tuned"
# Cards whose table serves another of the same chip: processors, clocks and power alike, memory not.
SIBLINGS = {"NVIDIA H100 80GB HBM3": "NVIDIA H200"}


def file_name(device_name: str) -> str:
    """The table's file name of a GPU, as torch names it: "NVIDIA H200" -> "NVIDIA_H200.json"."""
    return "".join(c if c.isalnum() or c in "-." else "_" for c in device_name) + ".json"


def update(path: Path, device_name: str, measured: str, ops: dict[str, dict[str, Any]]) -> None:
    """Put what was measured into the table at `path`, entry by entry: what `ops` doesn't name stays.

    A new file begins with the GPU's shipped table. Several runs that measure different operations side by
    side may write the same table.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)  # its lock leaves no file behind
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        known = json.loads(path.read_text())["ops"] if path.is_file() else own(device_name) or {}
        for op, entries in ops.items():
            known.setdefault(op, {}).update(entries)
        table = {"device": device_name, "measured": measured, "ops": known}
        draft = path.with_suffix(".part")
        draft.write_text(json.dumps(table, indent=1) + "\n")
        draft.replace(path)
    finally:
        os.close(folder)


def own(device_name: str, folder: Path = FOLDER) -> dict[str, dict[str, Any]] | None:
    """The operations of the table that was measured on this very GPU; None where there is none."""
    path = folder / file_name(device_name)
    if not path.is_file():
        return None
    ops: dict[str, dict[str, Any]] = json.loads(path.read_text())["ops"]
    return ops


@lru_cache(maxsize=16)
def load(device_name: str, folder: Path = FOLDER) -> dict[str, dict[str, Any]]:
    """The operations of a GPU's table, or its sibling's; one warning a process where it has none."""
    ops = own(device_name, folder)
    if ops is not None:
        return ops
    sibling = SIBLINGS.get(device_name)
    ops = own(sibling, folder) if sibling else None
    instead = "untuned settings" if ops is None else f"the settings of {sibling!r}, which has the same chip"
    warnings.warn(
        f"no tuning table {file_name(device_name)} for {device_name!r}: kernels run with {instead}; "
        "make one with `reel bench tune`",
        RuntimeWarning,
        stacklevel=3,
    )
    return ops or {}


@lru_cache(maxsize=256)
def _setting(op: str, key: str, device_index: int) -> dict[str, Any]:
    found: dict[str, Any] = load(torch.cuda.get_device_name(device_index)).get(op, {}).get(key, {})
    return found


def setting(op: str, key: str, device: torch.device, default: dict[str, Any]) -> dict[str, Any]:
    """`default`, overlaid with the table's entry of (`op`, `key`) for a CUDA device."""
    if device.type != "cuda":
        return default
    index = torch.cuda.current_device() if device.index is None else device.index
    return default | _setting(op, key, index)


def entries(op: str, device: torch.device) -> dict[str, Any]:
    """All entries of `op` in the device's table, by key; empty on a CPU."""
    if device.type != "cuda":
        return {}
    return load(torch.cuda.get_device_name(device)).get(op, {})

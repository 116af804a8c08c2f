"""Reading checkpoint files: strict, cast while loading, every fault named with its file.

Tensors come from safetensors shards (read by mmap) or from a `.pth` (`weights_only=True`, mmap). Shapes are
checked against the model before anything is read, so a wrong checkpoint fails in a second.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from engine.errors import CheckpointError

Shape = tuple[int, ...]
MAX_LISTED = 12  # faults spelled out in one error
MAX_HEADER = 100_000_000  # bytes, the format's own limit


@dataclass(frozen=True)
class Entry:
    """A tensor on disk: where it is and what shape it has."""

    path: Path
    name: str  # in the file
    shape: Shape
    tensor: Tensor | None = None  # mapped already (.pth)


def scan(paths: Iterable[Path], rename: Callable[[str], str] = str) -> dict[str, Entry]:
    """Every tensor of some files by its name in the model; reads headers only."""
    found: dict[str, Entry] = {}
    for path in paths:
        for entry in _scan_pth(path) if path.suffix == ".pth" else _scan_safetensors(path):
            name = rename(entry.name)
            if name in found:
                raise CheckpointError(f"tensor {entry.name} is in both {found[name].path} and {path}")
            found[name] = entry
    return found


def safetensors_files(folder: Path) -> list[Path]:
    """The shards of a folder: those its index names, or all of them when it has no index."""
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if indexes:
        names = sorted(set(json.loads(indexes[0].read_text(encoding="utf-8"))["weight_map"].values()))
        paths = [folder / name for name in names]
        missing = [path.name for path in paths if not path.exists()]
        if missing:
            raise CheckpointError(f"{indexes[0]} names shards that are not there: {', '.join(missing)}")
        return paths
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise CheckpointError(f"{folder} holds no .safetensors file; expected the transformer's shards there")
    return paths


def load_into(
    model: nn.Module,
    entries: Mapping[str, Entry],
    *,
    device: torch.device,
    dtype_of: Callable[[str], torch.dtype],
    on_bytes: Callable[[int], None] | None = None,
) -> None:
    """Fill a model built on the meta device with exactly these tensors, each cast to `dtype_of(name)`.

    `on_bytes` hears of each tensor's bytes on disk. Raises CheckpointError naming every missing, extra or
    misshapen tensor, before reading any.
    """
    check(expected_shapes(model), entries)
    state: dict[str, Tensor] = {}
    readers: dict[Path, safe_open] = {}
    for name, entry in entries.items():
        tensor = _read(entry, device, readers)
        state[name] = tensor.to(device=device, dtype=dtype_of(name))
        if on_bytes is not None:
            on_bytes(tensor.numel() * tensor.element_size())
    model.load_state_dict(state, strict=False, assign=True)  # `check` was stricter; tied names are absent
    model.requires_grad_(False).eval()


def expected_shapes(model: nn.Module) -> dict[str, Shape]:
    """Name and shape of every tensor that the model's checkpoint must hold (a tied one once)."""
    return {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}


def check(expected: Mapping[str, Shape], entries: Mapping[str, Entry]) -> None:
    """Raise CheckpointError unless the files hold exactly the expected tensors."""
    folder = next(iter(entries.values())).path.parent if entries else Path("the checkpoint")
    faults = [
        f"missing {name} {list(shape)}: in no file of {folder}"
        for name, shape in expected.items()
        if name not in entries
    ]
    for name, entry in entries.items():
        if name not in expected:
            faults.append(f"extra {entry.name} {list(entry.shape)} in {entry.path}")
        elif entry.shape != expected[name]:
            faults.append(
                f"{entry.name} in {entry.path} has shape {list(entry.shape)}, expected {list(expected[name])}"
            )
    if faults:
        more = len(faults) - MAX_LISTED
        listed = "; ".join(faults[:MAX_LISTED]) + (f"; and {more} more" if more > 0 else "")
        raise CheckpointError(f"the checkpoint doesn't fit the model: {listed}")


def total_bytes(entries: Iterable[Entry], bytes_each: int = 4) -> int:
    """Bytes that tensors take at `bytes_each` bytes an element."""
    return sum(math.prod(entry.shape) * bytes_each for entry in entries)


def _scan_safetensors(path: Path) -> list[Entry]:
    """Names and shapes from the header (8 bytes of length, then JSON); the data's length must be right."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, MAX_HEADER)))
        header.pop("__metadata__", None)
        end = 8 + length + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
        entries = [Entry(path, name, tuple(tensor["shape"])) for name, tensor in header.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(_unreadable(path, "safetensors", error)) from error
    if path.stat().st_size != end:
        raise CheckpointError(_unreadable(path, "safetensors", f"its header announces {end:,} bytes"))
    return entries


def _scan_pth(path: Path) -> list[Entry]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError or OSError
        raise CheckpointError(_unreadable(path, ".pth of tensors", error)) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} holds {type(state).__name__}, expected a dict of named tensors")
    return [Entry(path, name, tuple(tensor.shape), tensor) for name, tensor in state.items()]


def _read(entry: Entry, device: torch.device, readers: dict[Path, safe_open]) -> Tensor:
    if entry.tensor is not None:
        return entry.tensor
    if entry.path not in readers:
        readers[entry.path] = safe_open(entry.path, framework="pt", device=str(device))
    tensor: Tensor = readers[entry.path].get_tensor(entry.name)  # type: ignore[no-untyped-call]
    return tensor


def _unreadable(path: Path, kind: str, error: Exception | str) -> str:
    if not path.exists():
        return f"{path} is not there"
    size = path.stat().st_size
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"{path} ({size:,} bytes) can't be read as {kind}: cut short or damaged? ({reason}); copy it again"

"""Reading checkpoint files: strict, cast while loading, every fault named with its file.

Tensors come from safetensors shards (read by mmap) or from a `.pth` (`weights_only=True`, mmap). Shapes are
checked against the model before anything is read, so a wrong checkpoint fails in a second. How the bytes
get to the device is `engine.transfer`'s.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.errors import CheckpointError
from engine.parallel.mesh import Mesh
from engine.transfer import Files, Meter, Source, read

Shape = tuple[int, ...]
DtypeOf = Callable[[str], torch.dtype]  # by a tensor's name in the model
MAX_LISTED = 12  # faults spelled out in one error
MAX_HEADER = 100_000_000  # bytes, the format's own limit
# The format's names of what a weight may be stored as.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True)
class Entry:
    """A tensor on disk: where it is and what shape it has."""

    path: Path
    name: str  # in the file
    shape: Shape
    dtype: torch.dtype = torch.float32
    offset: int = 0  # bytes from the file's beginning
    tensor: Tensor | None = None  # mapped already (.pth)

    @property
    def count(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return self.count * self.dtype.itemsize


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


@dataclass(frozen=True)
class Reader:
    """Reads a checkpoint's tensors onto a device. Each byte is read by one rank of the mesh."""

    device: torch.device
    mesh: Mesh = field(default_factory=Mesh.single)
    on_bytes: Callable[[int], None] = lambda _: None  # hears of bytes as they come
    meter: Meter = field(default_factory=Meter)  # counts them

    def fill(self, model: nn.Module, entries: Mapping[str, Entry], dtype_of: DtypeOf) -> None:
        """Fill a model built on the meta device with exactly these tensors; a collective call.

        Raises CheckpointError naming every missing, extra or misshapen tensor, before reading any.
        """
        check(expected_shapes(model), entries)
        # `check` was stricter than load_state_dict; tied names are absent.
        model.load_state_dict(self.tensors(entries, dtype_of), strict=False, assign=True)
        model.requires_grad_(False).eval()

    def tensors(self, entries: Mapping[str, Entry], dtype_of: DtypeOf) -> dict[str, Tensor]:
        """The tensors by their names in the model, each cast to `dtype_of(name)`; a collective call."""
        files = Files()
        try:
            ordered = sorted(entries.items(), key=lambda item: (item[1].path, item[1].offset))
            sources = [_source(name, entry, dtype_of(name), files) for name, entry in ordered]
            with torch.no_grad():
                return read(sources, self.device, self.mesh, self.meter, self.on_bytes)
        finally:
            files.close()


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


def _scan_safetensors(path: Path) -> list[Entry]:
    """Names and shapes from the header (8 bytes of length, then JSON); the data's length must be right."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, MAX_HEADER)))
        header.pop("__metadata__", None)
        data = 8 + length
        end = data + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
        unknown = [name for name, tensor in header.items() if tensor["dtype"] not in DTYPES]
        if not unknown:
            entries = [
                Entry(path, name, tuple(t["shape"]), DTYPES[t["dtype"]], data + t["data_offsets"][0])
                for name, t in header.items()
            ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(_unreadable(path, "safetensors", error)) from error
    if path.stat().st_size != end:
        raise CheckpointError(_unreadable(path, "safetensors", f"its header announces {end:,} bytes"))
    if unknown:
        raise CheckpointError(
            f"{unknown[0]} in {path} is {header[unknown[0]]['dtype']}, expected one of {', '.join(DTYPES)}"
        )
    wrong = [e.name for e in entries if e.size != header[e.name]["data_offsets"][1] - e.offset + data]
    if wrong:
        raise CheckpointError(_unreadable(path, "safetensors", f"{wrong[0]}'s bytes don't fit its shape"))
    return entries


def _scan_pth(path: Path) -> list[Entry]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError or OSError
        raise CheckpointError(_unreadable(path, ".pth of tensors", error)) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} holds {type(state).__name__}, expected a dict of named tensors")
    return [Entry(path, name, tuple(t.shape), t.dtype, tensor=t) for name, t in state.items()]


def _source(name: str, entry: Entry, dtype: torch.dtype, files: Files) -> Source:
    if entry.tensor is not None:
        return Source(name, entry.tensor.reshape(-1), entry.shape, dtype, lambda first, many: None)
    elements, prefetch = files.elements(entry.path, entry.dtype, entry.offset, entry.count)
    return Source(name, elements, entry.shape, dtype, prefetch)


def _unreadable(path: Path, kind: str, error: Exception | str) -> str:
    if not path.exists():
        return f"{path} is not there"
    size = path.stat().st_size
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"{path} ({size:,} bytes) can't be read as {kind}: cut short or damaged? ({reason}); copy it again"

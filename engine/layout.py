"""Where the parts of a checkpoint folder are, by the files found in it.

The official layout: `high_noise_model/` and `low_noise_model/` (TI2V-5B: config and shards at the root), one
`models_t5*.pth`, `google/umt5-xxl/` (tokenizer), one `Wan2.x_VAE.pth`.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError
from engine.text_encoder import transformers_name
from engine.weights import Entry, safetensors_files, scan


@dataclass(frozen=True)
class Part:
    """One model of a checkpoint: its tensors by our names, and its config.json if it has one."""

    folder: Path
    entries: dict[str, Entry]
    config: dict[str, Any]


@dataclass(frozen=True)
class Layout:
    """All parts. With one expert `low` is None."""

    kind: str
    high: Part
    low: Part | None
    vae: Part
    text: Part
    tokenizer: Path


def find_layout(folder: Path) -> Layout:
    """The parts of the checkpoint in `folder`; reads headers only. Raises CheckpointError."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; expected a checkpoint folder")
    if (folder / "high_noise_model").is_dir() or (folder / "low_noise_model").is_dir():
        high: Part = _dit(folder / "high_noise_model")
        low: Part | None = _dit(folder / "low_noise_model")
    elif (folder / "config.json").exists():
        high, low = _dit(folder), None
    else:
        raise CheckpointError(
            f"{folder} is no checkpoint that this version knows: expected high_noise_model/ and "
            f"low_noise_model/, or config.json with the transformer's shards; found {_listing(folder)}"
        )
    return Layout(
        kind="official",
        high=high,
        low=low,
        vae=_pth(folder, "Wan2.*_VAE.pth"),
        text=_pth(folder, "models_t5_*.pth", transformers_name),
        tokenizer=_tokenizer(folder / "google" / "umt5-xxl"),
    )


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is not there") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {type(value).__name__}, expected an object")
    return value


def _dit(folder: Path) -> Part:
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not there; this layout has two experts")
    return Part(folder, scan(safetensors_files(folder)), read_json(folder / "config.json"))


def _pth(folder: Path, pattern: str, rename: Callable[[str], str] = str) -> Part:
    paths = sorted(folder.glob(pattern))
    if len(paths) != 1:
        found = ", ".join(path.name for path in paths) or "none"
        raise CheckpointError(f"expected one {pattern} in {folder}, found {found}")
    return Part(folder, scan(paths, rename), {})


def _tokenizer(folder: Path) -> Path:
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not there; the tokenizer's files belong in it")
    return folder


def _listing(folder: Path) -> str:
    names = sorted(path.name + ("/" if path.is_dir() else "") for path in folder.iterdir())
    return ", ".join(names[:10]) + (" ..." if len(names) > 10 else "") or "an empty folder"

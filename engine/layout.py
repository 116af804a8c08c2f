"""Where the parts of a checkpoint folder are, by the files found in it.

The official layout: `high_noise_model/` and `low_noise_model/` (TI2V-5B: config and shards at the root), one
`models_t5*.pth`, `google/umt5-xxl/` (tokenizer), one `Wan2.x_VAE.pth`.

The diffusers layout: `model_index.json` and a folder a part, where `transformer` is the high-noise expert.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.diffusers_names import dit_name, vae21_name, vae22_name
from engine.errors import CheckpointError
from engine.umt5 import transformers_name
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
    facts: Mapping[str, Any] = field(default_factory=dict)  # fields of engine.specs.Facts that its files tell


def find_layout(folder: Path) -> Layout:
    """The parts of the checkpoint in `folder`; reads headers only. Raises CheckpointError."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; expected a checkpoint folder")
    if (folder / "model_index.json").exists():
        return _diffusers(folder)
    if (folder / "high_noise_model").is_dir() or (folder / "low_noise_model").is_dir():
        high: Part = _dit(folder / "high_noise_model")
        low: Part | None = _dit(folder / "low_noise_model")
    elif (folder / "config.json").exists():
        high, low = _dit(folder), None
    else:
        raise CheckpointError(
            f"{folder} is no checkpoint that this version knows: expected high_noise_model/ and "
            "low_noise_model/, or config.json with the transformer's shards, or model_index.json; "
            f"found {_listing(folder)}"
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


def _diffusers(folder: Path) -> Layout:
    """The diffusers layout, under the names that our modules carry."""
    index, vae_config = read_json(folder / "model_index.json"), read_json(folder / "vae" / "config.json")
    vae_name = vae22_name if vae_config.get("is_residual") else vae21_name
    two_experts = (folder / "transformer_2").is_dir()
    facts: dict[str, Any] = {
        ours: tuple(vae_config[theirs])
        for ours, theirs in (("latent_mean", "latents_mean"), ("latent_std", "latents_std"))
        if theirs in vae_config
    }
    if two_experts and index.get("boundary_ratio") is not None:
        facts["boundary"] = index["boundary_ratio"]
    text = scan(safetensors_files(folder / "text_encoder"))
    if "shared.weight" in text:
        text.pop("encoder.embed_tokens.weight", None)  # the same tensor under its second name
    return Layout(
        kind="diffusers",
        high=_diffusers_dit(folder / "transformer"),
        low=_diffusers_dit(folder / "transformer_2") if two_experts else None,
        vae=Part(folder / "vae", scan(safetensors_files(folder / "vae"), vae_name), {}),
        text=Part(folder / "text_encoder", text, {}),
        tokenizer=_tokenizer(folder / "tokenizer"),
        facts=facts,
    )


def _diffusers_dit(folder: Path) -> Part:
    config = read_json(folder / "config.json")
    ours = {"num_heads": config.get("num_attention_heads"), "eps": config.get("eps", 1e-6)}
    return Part(folder, scan(safetensors_files(folder), dit_name), ours)


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

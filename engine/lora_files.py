"""LoRA files of either public key style, as changes to our tensors.

A LoRA changes a weight W by strength * alpha / rank * up @ down (arXiv:2106.09685); without an alpha it
counts as the rank. Keys as they are found in the wild, `M` standing for a module:

- kohya: `lora_unet_blocks_0_self_attn_q.lora_down.weight`, `.lora_up.weight`, `.alpha`
- diffusers: `transformer.blocks.0.attn1.to_q.lora_A.weight`, `.lora_B.weight`
- the official names with either suffix: `diffusion_model.blocks.0.self_attn.q.lora_down.weight`
- whole differences beside them: `M.diff` (of a weight) and `M.diff_b` (of a bias)
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.diffusers_names import dit_name
from engine.errors import RequestError

PREFIXES = ("base_model.model.", "diffusion_model.", "transformer.", "transformer_2.", "model.", "unet.")
KOHYA = "lora_unet_"
# What a key ends with -> what it is.
ENDINGS = (
    (".lora_down.weight", "down"),
    (".lora_A.weight", "down"),
    (".lora_A.default.weight", "down"),
    (".lora_up.weight", "up"),
    (".lora_B.weight", "up"),
    (".lora_B.default.weight", "up"),
    (".alpha", "alpha"),
    (".diff_b", "diff_b"),
    (".diff", "diff"),
)
# Diffusers' module names in kohya's underscored form -> the official ones.
UNDERSCORED = (
    (r"_attn1_to_", "_self_attn_"),
    (r"_attn2_to_", "_cross_attn_"),
    (r"_attn_out_0$", "_attn_o"),
    (r"_ffn_net_0_proj$", "_ffn_0"),
    (r"_ffn_net_2$", "_ffn_2"),
)
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
SUFFIX = ".safetensors"


@dataclass
class Change:
    """What a file does to one tensor: up @ down * scale, a whole difference, or both."""

    up: Tensor | None = None
    down: Tensor | None = None
    alpha: float | None = None
    diff: Tensor | None = None

    def delta(self) -> Tensor:
        """The change at strength 1, fp32, in the weight's shape or flattened over a convolution's kernel."""
        delta = None
        if self.up is not None and self.down is not None:
            rank = self.down.shape[0]
            scale = 1.0 if self.alpha is None else self.alpha / rank
            delta = self.up.float().flatten(1) @ self.down.float().flatten(1) * scale
        if self.diff is not None:
            delta = self.diff.float() if delta is None else delta + self.diff.float().flatten(1)
        assert delta is not None
        return delta

    def to(self, device: torch.device) -> "Change":
        """The same on a device."""
        up, down, diff = (x if x is None else x.to(device) for x in (self.up, self.down, self.diff))
        return Change(up, down, self.alpha, diff)


@dataclass(frozen=True)
class LoraFolder:
    """The folder that requests may name LoRAs of: `<name>.safetensors`, and nothing outside it."""

    folder: Path

    def names(self) -> list[str]:
        """Every LoRA there is, sorted."""
        if not self.folder.is_dir():
            return []
        return sorted(p.stem for p in self.folder.glob(f"*{SUFFIX}") if NAME.fullmatch(p.stem))

    def path(self, name: str) -> Path:
        """The file of a LoRA. Raises RequestError for a name that isn't in the folder."""
        path = self.folder / f"{name}{SUFFIX}"
        if not NAME.fullmatch(name) or not path.is_file():
            raise RequestError("loras", name, ", ".join(self.names()) or f"none: {self.folder} holds no LoRA")
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise RequestError("loras", name, f"a file in {self.folder}; this one links out of it")
        return path

    def stamp(self, name: str) -> tuple[int, int]:
        """What changes when a LoRA's file is replaced. Raises RequestError as `path` does."""
        found = self.path(name).stat()
        return found.st_mtime_ns, found.st_size


def read_lora(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Change]:
    """A file's changes by our tensor names; `shapes` are the expert's tensors.

    Raises RequestError naming the file and every key that doesn't fit.
    """
    reader = _Reader({name.rpartition(".")[0].replace(".", "_"): name.rpartition(".")[0] for name in shapes})
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 -- not a dict
                reader.take(key, file.get_tensor(key))
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise RequestError("loras", path.stem, f"a whole safetensors file ({path}: {error})") from error
    faults = [*reader.unknown]
    for name, change in reader.changes.items():
        if name not in shapes:
            faults.append(f"{name} is no tensor of the expert")
        elif (change.up is None) != (change.down is None) or (change.up is None and change.diff is None):
            faults.append(f"{name} has only half of its factors")
        elif not _fits(change, shapes[name]):
            faults.append(f"the change of {name} doesn't have its shape {list(shapes[name])}")
    if faults or not reader.changes:
        listed = "; ".join(faults[:8]) + (f"; and {len(faults) - 8} more" if len(faults) > 8 else "")
        raise RequestError("loras", path.stem, f"a LoRA for this model ({path}: {listed or 'it is empty'})")
    return reader.changes


def _fits(change: Change, shape: tuple[int, ...]) -> bool:
    if change.up is not None and change.down is not None:
        if change.up[0].numel() != change.down.shape[0] or change.up.shape[0] != shape[0]:
            return False
        if change.up.shape[0] * change.down[0].numel() != math.prod(shape):
            return False
    return change.diff is None or tuple(change.diff.shape) == shape


@dataclass
class _Reader:
    """Sorts a file's keys."""

    modules: dict[str, str]  # a module's name with underscores -> with dots
    changes: dict[str, Change] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)

    def take(self, key: str, tensor: Tensor) -> None:
        """Put one tensor where it belongs."""
        ending = next(((end, kind) for end, kind in ENDINGS if key.endswith(end)), None)
        module = None if ending is None else self.module(key.removesuffix(ending[0]))
        if ending is None or module is None:
            self.unknown.append(f"{key} is not understood")
            return
        kind = ending[1]
        name = f"{module}.bias" if kind == "diff_b" else f"{module}.weight"
        change = self.changes.setdefault(name, Change())
        if kind == "alpha":
            change.alpha = float(tensor.float().item())
        elif kind == "up":
            change.up = tensor
        elif kind == "down":
            change.down = tensor
        else:
            change.diff = tensor

    def module(self, text: str) -> str | None:
        """Our name of a module, or None."""
        if text.startswith(KOHYA):
            text = text.removeprefix(KOHYA)
            for pattern, ours in UNDERSCORED:
                text = re.sub(pattern, ours, text)
            return self.modules.get(re.sub(r"_attn_to_out_0$|_attn_out_0$", "_attn_o", text))
        for prefix in PREFIXES:
            text = text.removeprefix(prefix)
        return dit_name(f"{text}.weight").removesuffix(".weight")

"""LoRA files with random factors for a small expert, in every key style that is found in the wild."""

import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.dit import DiT

RANK = 4
OURS_TO_DIFFUSERS = (
    (r"\.self_attn\.([qkv])$", r".attn1.to_\1"),
    (r"\.self_attn\.o$", ".attn1.to_out.0"),
    (r"\.cross_attn\.([qkv])$", r".attn2.to_\1"),
    (r"\.cross_attn\.o$", ".attn2.to_out.0"),
    (r"\.ffn\.0$", ".ffn.net.0.proj"),
    (r"\.ffn\.2$", ".ffn.net.2"),
)


def diffusers_module(module: str) -> str:
    for pattern, theirs in OURS_TO_DIFFUSERS:
        module = re.sub(pattern, theirs, module)
    return module


# Style -> (module's key, down's ending, up's ending, whether it has an alpha)
STYLES: dict[str, tuple[Callable[[str], str], str, str, bool]] = {
    "kohya": (lambda m: "lora_unet_" + m.replace(".", "_"), "lora_down", "lora_up", True),
    "kohya of diffusers' modules": (
        lambda m: "lora_unet_" + diffusers_module(m).replace(".", "_"), "lora_down", "lora_up", True,
    ),
    "diffusers": (lambda m: "transformer." + diffusers_module(m), "lora_A", "lora_B", False),
    "official": (lambda m: "diffusion_model." + m, "lora_A", "lora_B", False),
    "distilled": (lambda m: "diffusion_model." + m, "lora_down", "lora_up", True),
}  # fmt: skip


def modules(expert: DiT) -> list[str]:
    """Every linear layer of the blocks."""
    return [
        name.removesuffix(".weight")
        for name, parameter in expert.named_parameters()
        if name.startswith("blocks.") and name.endswith(".weight") and parameter.ndim == 2
    ]


def factors(expert: DiT, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """(up, down) of each module."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: tuple(p.shape) for name, p in expert.named_parameters()}
    return {
        module: (
            torch.randn(shapes[f"{module}.weight"][0], RANK, generator=generator) * 0.1,
            torch.randn(RANK, shapes[f"{module}.weight"][1], generator=generator) * 0.1,
        )
        for module in modules(expert)
    }


def write_lora(path: Path, expert: DiT, style: str = "kohya", seed: int = 3, alpha: float = 2.0) -> Path:
    """A LoRA of rank 4 over every linear layer; styles with an alpha change half as much at alpha 2."""
    key, down_end, up_end, has_alpha = STYLES[style]
    tensors = {}
    for module, (up, down) in factors(expert, seed).items():
        tensors[f"{key(module)}.{up_end}.weight"] = up
        tensors[f"{key(module)}.{down_end}.weight"] = down
        if has_alpha:
            tensors[f"{key(module)}.alpha"] = torch.tensor(alpha)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path

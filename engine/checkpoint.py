"""What a checkpoint folder holds: its parts, the shapes of its models, and the facts known of it."""

from dataclasses import dataclass
from pathlib import Path

from engine.config import DiTConfig, VAEConfig
from engine.errors import CheckpointError
from engine.layout import Layout, Part, find_layout
from engine.specs import Facts, find_facts
from engine.weights import Shape


@dataclass(frozen=True)
class Checkpoint:
    """A folder as it was found; no weight has been read."""

    folder: Path
    layout: Layout
    facts: Facts
    dit: DiTConfig
    vae: VAEConfig


def open_checkpoint(folder: Path, name: str | None = None) -> Checkpoint:
    """Find and describe all parts. `name` picks the model's facts when the folder can't tell.

    Raises CheckpointError for what is missing or doesn't fit together.
    """
    layout = find_layout(folder)
    dit = read_dit_config(layout)
    facts = find_facts(folder, dit.in_channels, layout.low is not None, name, layout.facts)
    return Checkpoint(folder, layout, facts, dit, read_vae_config(layout.vae, facts))


def read_dit_config(layout: Layout) -> DiTConfig:
    """The experts' shape: sizes from the tensors' shapes, the rest from config.json. Experts must agree."""
    config = _dit_config(layout.high)
    if layout.low is not None and _dit_config(layout.low) != config:
        raise CheckpointError(
            f"the experts differ: {layout.high.folder} is {config}, "
            f"{layout.low.folder} is {_dit_config(layout.low)}"
        )
    return config


def read_vae_config(part: Part, facts: Facts) -> VAEConfig:
    """The VAE's shape from its tensors; its latents' statistics from the model's facts."""
    shapes = _shapes(part, "encoder.conv1.weight", "decoder.conv1.weight", "conv2.weight")
    base, in_channels = shapes["encoder.conv1.weight"][:2]
    z_dim = shapes["conv2.weight"][0]
    if not len(facts.latent_mean) == len(facts.latent_std) == z_dim:
        raise CheckpointError(
            f"the VAE in {part.folder} has {z_dim} latent channels but {facts.name} has statistics of "
            f"{len(facts.latent_mean)} (mean) and {len(facts.latent_std)} (std); "
            "set latent_mean and latent_std in reel.json"
        )
    return VAEConfig(
        kind="2.1" if in_channels == 3 else "2.2",
        base_dim=base,
        decoder_base_dim=shapes["decoder.conv1.weight"][0] // 4,
        z_dim=z_dim,
        latent_mean=facts.latent_mean,
        latent_std=facts.latent_std,
        stride=(4, 8, 8) if in_channels == 3 else (4, 16, 16),
    )


def _dit_config(part: Part) -> DiTConfig:
    shapes = _shapes(
        part, "patch_embedding.weight", "text_embedding.0.weight", "time_embedding.0.weight",
        "blocks.0.ffn.0.weight", "head.head.weight",
    )  # fmt: skip
    dim, in_channels, *patch = shapes["patch_embedding.weight"]
    volume = patch[0] * patch[1] * patch[2]
    heads = part.config.get("num_heads")
    if not isinstance(heads, int) or heads < 1 or dim % heads:
        raise CheckpointError(
            f"{part.folder / 'config.json'}: num_heads is {heads!r}, expected a divisor of {dim}"
        )
    return DiTConfig(
        dim=dim,
        ffn_dim=shapes["blocks.0.ffn.0.weight"][0],
        num_heads=heads,
        num_layers=1 + max(int(name.split(".")[1]) for name in part.entries if name.startswith("blocks.")),
        in_channels=in_channels,
        out_channels=shapes["head.head.weight"][0] // volume,
        text_dim=shapes["text_embedding.0.weight"][1],
        text_len=part.config.get("text_len", 512),
        freq_dim=shapes["time_embedding.0.weight"][1],
        patch_size=(patch[0], patch[1], patch[2]),
        eps=part.config.get("eps", 1e-6),
    )


def _shapes(part: Part, *names: str) -> dict[str, Shape]:
    missing = [name for name in names if name not in part.entries]
    if missing:
        raise CheckpointError(f"{part.folder} lacks {', '.join(missing)}: is it the right checkpoint?")
    return {name: part.entries[name].shape for name in names}

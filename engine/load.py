"""From a checkpoint folder to a pipeline that is ready for requests."""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from engine.attention import pick_attend
from engine.checksums import verify as verify_checksums
from engine.config import DiTConfig, VAEConfig
from engine.errors import CheckpointError
from engine.ladder import plan_kept_attention, plan_memory
from engine.layout import Layout, Part, find_layout
from engine.loader import Loader, OnBytes
from engine.lora import Loras
from engine.lora_files import LoraFolder
from engine.memory import RUNGS, Rung
from engine.parallel.mesh import Mesh
from engine.pipeline import Pipeline
from engine.presets import ALONE, Machine, held_blocks, offers
from engine.specs import Facts, find_facts, make_spec
from engine.vae import VAE
from engine.weights import Shape

WeightForm = Literal["full", "8bit"]


def load_pipeline(
    folder: Path,
    *,
    mesh: Mesh | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    name: str | None = None,
    loras: Path | None = None,
    verify: bool = False,
    memory_limit: int | None = None,
    rung: Rung | None = None,
    forbidden: Collection[str] = (),
    weights: WeightForm = "full",
    on_bytes: OnBytes = lambda part, came, total: None,
) -> Pipeline:
    """Load every part of the checkpoint in `folder` onto `device`; a collective call of the mesh's ranks.

    `dtype` is that of the big matrix products: bf16 on a GPU and fp32 on a CPU unless given. `name` picks the
    model's facts (`engine.specs.KNOWN`) when the folder can't tell. `loras` is the folder that requests may
    name LoRAs of (the checkpoint's own `loras/` unless given). `verify` compares checksums first. The memory
    plan is made, logged and checked before any weight is read: `memory_limit` is the bytes of one GPU that
    may be used (all that are free unless given), `rung` a rung of `engine.memory`'s ladder instead of the
    first that fits. Requests may not name the presets `forbidden`. With `weights` "8bit" blocks
    that the model's presets compute in 8 bits are held in 8 bits alone: `lossless`, `draft` and LoRAs, which
    need the published weights, are then refused. `on_bytes` hears of the loading's
    progress. No rank returns before all have loaded: from then on they may not differ by much. Raises
    CheckpointError, DoesNotFit.
    """
    mesh, folder = mesh or Mesh.single(), Path(folder)
    device = default_device(mesh) if device is None else torch.device(device)
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    vae_dtype = torch.float32 if device.type == "cpu" or dtype == torch.float32 else torch.float16
    layout = find_layout(folder)
    dit_config = read_dit_config(layout)
    facts = find_facts(folder, dit_config.in_channels, layout.low is not None, name, layout.facts)
    vae_config = read_vae_config(layout.vae, facts)
    if dit_config.num_heads % mesh.ulysses:
        raise CheckpointError(
            f"{facts.name} has {dit_config.num_heads} heads, which {mesh.ulysses} sequence parts don't divide"
        )
    lora_folder = LoraFolder(loras or folder / "loras")
    names = lora_folder.names() if weights == "full" else []
    machine = Machine(capability(device), names, forbidden, only_eight=weights == "8bit")
    presets = offers(facts.presets, machine)
    held = held_blocks(presets, dit_config.num_layers) if weights == "8bit" else frozenset[int]()
    spec = replace(make_spec(facts, dit_config, vae_config), loras=tuple(names), presets=presets)
    if verify:
        verify_checksums(folder, mesh)
    plan = plan_memory(spec, layout, mesh, device, dtype, vae_dtype, memory_limit, rung, held)
    spec, plan = plan_kept_attention(spec, plan, mesh, dtype)

    load = Loader(mesh, device, dtype, vae_dtype, on_bytes)
    high, low, exchange = load.experts(layout, dit_config, plan.rung, held)
    vae = load.part("VAE", VAE, vae_config, layout.vae, lambda _: vae_dtype)
    # Last, as on the CPU rank 0 alone reads it, and no collective call may wait for that.
    text_encoder = load.text_encoder(layout, dit_config, on_cpu=plan.step >= RUNGS.index("text"))
    self_attend, cross_attend = (
        pick_attend(kind, dtype, dit_config.head_dim, device) for kind in ("self", "cross")
    )
    mesh.meet()
    pipeline = Pipeline(spec, text_encoder, high, low, vae, mesh, device, self_attend, cross_attend)
    pipeline.exchange = exchange
    pipeline.eight.blocks.held = load.held
    room = plan.available - plan.total
    pipeline.eight.keep(room if plan.step < RUNGS.index("shard") else 0, dit_config)
    pipeline.branches_in_turn = plan.step >= RUNGS.index("branches")
    if weights == "full":
        pipeline.loras = Loras(lora_folder, high, low, mesh)
    else:
        pipeline.no_loras = f"{ALONE}, which none is merged into"
    return pipeline


def default_device(mesh: Mesh) -> torch.device:
    """This rank's GPU, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", mesh.rank % torch.cuda.device_count())


def capability(device: torch.device) -> tuple[int, int] | None:
    """The GPU's compute capability, None for a CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


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

"""From a checkpoint folder to a pipeline that is ready for requests."""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from engine.attention import pick_attend
from engine.checkpoint import Checkpoint, open_checkpoint
from engine.checksums import verify as verify_checksums
from engine.config import ModelSpec
from engine.errors import CheckpointError
from engine.ladder import plan_kept_attention, plan_memory
from engine.loader import Loader, OnBytes
from engine.lora import Loras
from engine.lora_files import LoraFolder
from engine.memory import RUNGS, MemoryPlan, Rung
from engine.parallel.mesh import Mesh
from engine.pipeline import Pipeline
from engine.presets import ALONE, Machine, held_blocks, offers
from engine.specs import make_spec
from engine.vae import VAE

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
    checkpoint = open_checkpoint(folder, name)
    if checkpoint.dit.num_heads % mesh.ulysses:
        raise CheckpointError(
            f"{checkpoint.facts.name} has {checkpoint.dit.num_heads} heads, "
            f"which {mesh.ulysses} sequence parts don't divide"
        )
    lora_folder = LoraFolder(loras or folder / "loras")
    spec, held = _offer(checkpoint, lora_folder, device, forbidden, weights)
    if verify:
        verify_checksums(folder, mesh)
    layout = checkpoint.layout
    plan = plan_memory(spec, layout, mesh, device, dtype, vae_dtype, memory_limit, rung, held)
    spec, plan = plan_kept_attention(spec, plan, mesh, dtype)
    pipeline = _read(checkpoint, spec, plan, Loader(mesh, device, dtype, vae_dtype, on_bytes), held)
    mesh.meet()
    if weights == "full":
        pipeline.loras = Loras(lora_folder, pipeline.high, pipeline.low, mesh)
    else:
        pipeline.no_loras = f"{ALONE}, which none is merged into"
    return pipeline


def _offer(
    checkpoint: Checkpoint,
    loras: LoraFolder,
    device: torch.device,
    forbidden: Collection[str],
    weights: WeightForm,
) -> tuple[ModelSpec, frozenset[int]]:
    """What requests may ask of this model here, and the blocks that are held in 8 bits alone."""
    names = loras.names() if weights == "full" else []
    machine = Machine(capability(device), names, forbidden, only_eight=weights == "8bit")
    presets = offers(checkpoint.facts.presets, machine)
    held = held_blocks(presets, checkpoint.dit.num_layers) if weights == "8bit" else frozenset[int]()
    spec = make_spec(checkpoint.facts, checkpoint.dit, checkpoint.vae)
    return replace(spec, loras=tuple(names), presets=presets), held


def _read(
    checkpoint: Checkpoint, spec: ModelSpec, plan: MemoryPlan, load: Loader, held: frozenset[int]
) -> Pipeline:
    """All weights, where the plan's rung puts them, and the pipeline that runs on them."""
    layout, dit = checkpoint.layout, checkpoint.dit
    high, low, exchange = load.experts(layout, dit, plan.rung, held)
    vae = load.part("VAE", VAE, checkpoint.vae, layout.vae, lambda _: load.vae_dtype)
    # Last, as on the CPU rank 0 alone reads it, and no collective call may wait for that.
    text_encoder = load.text_encoder(layout, dit, on_cpu=plan.step >= RUNGS.index("text"))
    self_attend, cross_attend = (
        pick_attend(kind, load.dtype, dit.head_dim, load.device) for kind in ("self", "cross")
    )
    pipeline = Pipeline(spec, text_encoder, high, low, vae, load.mesh, load.device, self_attend, cross_attend)
    pipeline.exchange = exchange
    pipeline.eight.blocks.held = load.held
    room = plan.available - plan.total
    pipeline.eight.keep(room if plan.step < RUNGS.index("shard") else 0, dit)
    pipeline.branches_in_turn = plan.step >= RUNGS.index("branches")
    return pipeline


def default_device(mesh: Mesh) -> torch.device:
    """This rank's GPU, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", mesh.rank % torch.cuda.device_count())


def capability(device: torch.device) -> tuple[int, int] | None:
    """The GPU's compute capability, None for a CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None

"""From a checkpoint folder to a pipeline that is ready for requests."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from engine.attention import pick_attend
from engine.config import DiTConfig, VAEConfig
from engine.dit import DiT, stays_fp32
from engine.errors import CheckpointError
from engine.layout import Layout, Part, find_layout
from engine.parallel.mesh import Mesh
from engine.pipeline import Pipeline
from engine.specs import Facts, find_facts, make_spec
from engine.text_encoder import TextEncoder, load_tokenizer
from engine.umt5 import config_from_shapes, official_name
from engine.vae import VAE
from engine.weights import Shape, load_into

log = logging.getLogger(__name__)
M = TypeVar("M", bound=nn.Module)


def load_pipeline(
    folder: Path,
    *,
    mesh: Mesh | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    name: str | None = None,
) -> Pipeline:
    """Load every part of the checkpoint in `folder` onto `device`.

    `dtype` is that of the big matrix products: bf16 on a GPU and fp32 on a CPU unless given. `name` picks the
    model's facts (`engine.specs.KNOWN`) when the folder can't tell. Raises CheckpointError.
    """
    mesh = mesh or Mesh.single()
    device = default_device(mesh) if device is None else torch.device(device)
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    layout = find_layout(Path(folder))
    dit_config = read_dit_config(layout)
    facts = find_facts(Path(folder), dit_config.in_channels, layout.low is not None, name, layout.facts)
    vae_config = read_vae_config(layout.vae, facts)
    if dit_config.num_heads % mesh.ulysses:
        raise CheckpointError(
            f"{facts.name} has {dit_config.num_heads} heads, which {mesh.ulysses} sequence parts don't divide"
        )

    high = _dit(layout.high, dit_config, device, dtype)
    low = None if layout.low is None else _dit(layout.low, dit_config, device, dtype)
    vae_dtype = torch.float32 if device.type == "cpu" or dtype == torch.float32 else torch.float16
    vae = _load("VAE", lambda: VAE(vae_config), layout.vae, device, lambda _: vae_dtype)
    text_encoder = _text_encoder(layout, dit_config, device, dtype)
    spec = make_spec(facts, dit_config, vae_config)
    self_attend, cross_attend = (
        pick_attend(kind, dtype, dit_config.head_dim, device) for kind in ("self", "cross")
    )
    return Pipeline(spec, text_encoder, high, low, vae, mesh, device, self_attend, cross_attend)


def default_device(mesh: Mesh) -> torch.device:
    """This rank's GPU, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", mesh.rank % torch.cuda.device_count())


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


def _dit(part: Part, config: DiTConfig, device: torch.device, dtype: torch.dtype) -> DiT:
    def dtype_of(tensor: str) -> torch.dtype:
        return torch.float32 if stays_fp32(tensor) else dtype

    return _load(part.folder.name, lambda: DiT(config), part, device, dtype_of)


def _text_encoder(layout: Layout, dit: DiTConfig, device: torch.device, dtype: torch.dtype) -> TextEncoder:
    try:
        config = config_from_shapes(
            {official_name(name): entry.shape for name, entry in layout.text.entries.items()}
        )
    except KeyError as error:
        raise CheckpointError(f"the text encoder in {layout.text.folder} lacks {error.args[0]}") from None
    if config.d_model != dit.text_dim:
        raise CheckpointError(
            f"the text encoder in {layout.text.folder} is {config.d_model} wide, "
            f"the transformer expects {dit.text_dim}"
        )
    with torch.device("meta"):
        encoder = TextEncoder(config, load_tokenizer(layout.tokenizer), dit.text_len)
    _load("text encoder", lambda: encoder.umt5, layout.text, device, lambda _: dtype)
    encoder.umt5.encoder.embed_tokens.weight = encoder.umt5.shared.weight
    return encoder.eval()


def _load(
    label: str,
    build: Callable[[], M],
    part: Part,
    device: torch.device,
    dtype_of: Callable[[str], torch.dtype],
) -> M:
    """Build a model without memory, fill it from its files, and log the rate."""
    start, read = time.perf_counter(), 0

    def count(size: int) -> None:
        nonlocal read
        read += size

    with torch.device("meta"):
        model = build()
    load_into(model, part.entries, device=device, dtype_of=dtype_of, on_bytes=count)
    seconds = time.perf_counter() - start
    log.info("loaded %s: %.2f GB in %.1f s, %.2f GB/s", label, read / 1e9, seconds, read / 1e9 / seconds)
    return model

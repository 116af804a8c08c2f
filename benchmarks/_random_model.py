"""Whole models with random weights made on the device: no checkpoint, the real shapes.

Weights are scaled by their fan-in, so that activations stay of order one and no kernel meets infinities.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.attention import pick_attend
from engine.checkpoint_writer import build_tokenizer
from engine.config import DiTConfig, ModelSpec, VAEConfig
from engine.dit import DiT, stays_fp32
from engine.layout import Layout, Part
from engine.memory import RUNGS, MemoryPlan
from engine.offload import HostTextEncoder, PromptEncoder
from engine.parallel.mesh import Mesh
from engine.pipeline import Pipeline
from engine.specs import I2V_A14B, T2V_A14B, TI2V_5B, Facts, make_spec
from engine.text_encoder import TextEncoder
from engine.tiny import CORPUS, TINY_DIT, TINY_VAE
from engine.umt5 import umt5_config
from engine.vae import VAE
from engine.weights import Entry, expected_shapes

VAE_21 = VAEConfig("2.1", 96, 96, 16, T2V_A14B.latent_mean, T2V_A14B.latent_std)
VAE_22 = VAEConfig("2.2", 160, 256, 48, TI2V_5B.latent_mean, TI2V_5B.latent_std, stride=(4, 16, 16))
TINY_22 = VAEConfig("2.2", 8, 12, 48, TI2V_5B.latent_mean, TI2V_5B.latent_std, stride=(4, 16, 16))


@dataclass(frozen=True)
class Shape:
    """A model to be made: its architecture, its facts, and its text encoder's size."""

    facts: Facts
    dit: DiTConfig
    vae: VAEConfig
    text: tuple[int, int, int, int, int, int]  # vocabulary, width, attention width, ffn, heads, layers
    experts: int

    @property
    def spec(self) -> ModelSpec:
        """As a checkpoint of this shape would have it."""
        return make_spec(self.facts, self.dit, self.vae)


XXL = (256_384, 4096, 4096, 10_240, 64, 24)
SMALL = (384, 32, 32, 64, 4, 2)
FULL = {
    "A14B": Shape(
        replace(T2V_A14B, max_frame_num=81), DiTConfig(5120, 13_824, 40, 40), VAE_21, XXL, experts=2
    ),
    "I2V": Shape(
        replace(I2V_A14B, max_frame_num=81), DiTConfig(5120, 13_824, 40, 40, 36), VAE_21, XXL, experts=2
    ),
    "5B": Shape(
        replace(TI2V_5B, max_frame_num=121), DiTConfig(3072, 14_336, 24, 30, 48, 48), VAE_22, XXL, experts=1
    ),
}
TINY = {
    "A14B": Shape(
        replace(T2V_A14B, frame_num=5, max_frame_num=5, sizes=((32, 16),)),
        TINY_DIT,
        TINY_VAE,
        SMALL,
        experts=2,
    ),
    "5B": Shape(
        replace(TI2V_5B, frame_num=5, max_frame_num=5, sizes=((32, 64),)),
        replace(TINY_DIT, in_channels=48, out_channels=48), TINY_22, SMALL, experts=1,
    ),
}  # fmt: skip


def random_tensor(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A weight that keeps signals of order one: norms near 1, matrices by fan-in, the rest small."""
    tensor = torch.empty(shape, dtype=dtype, device=device)
    if name.endswith("gamma") or ("norm" in name and name.endswith("weight")):
        return tensor.fill_(1)
    if len(shape) > 1 and "modulation" not in name:
        return tensor.normal_(0, float(tensor[0].numel()) ** -0.5)
    return tensor.normal_(0, 0.02)


def fill(model: nn.Module, device: torch.device, dtype: torch.dtype, keep_fp32: bool = False) -> nn.Module:
    """A model built on the meta device, with random weights on `device`."""
    state = {
        name: random_tensor(
            name, tuple(p.shape), torch.float32 if keep_fp32 and stays_fp32(name) else dtype, device
        )
        for name, p in model.named_parameters()
    }
    model.load_state_dict(state, strict=False, assign=True)
    return model.requires_grad_(False).eval()


def meta_parts(shape: Shape) -> tuple[DiT, VAE, TextEncoder]:
    """The parts without memory."""
    tokenizer = build_tokenizer(CORPUS, 384)
    with torch.device("meta"):
        return DiT(shape.dit), VAE(shape.vae), TextEncoder(umt5_config(*shape.text), tokenizer)


def layout_of(shape: Shape) -> Layout:
    """What the memory plan asks of a checkpoint: names and shapes."""
    dit, vae, text = meta_parts(shape)

    def part(model: nn.Module) -> Part:
        folder = Path("random")
        return Part(folder, {n: Entry(folder, n, s) for n, s in expected_shapes(model).items()}, {})

    low = part(dit) if shape.experts > 1 else None
    return Layout("official", part(dit), low, part(vae), part(text.umt5), Path("random"))


def random_pipeline(
    shape: Shape,
    plan: MemoryPlan,
    device: torch.device,
    dtype: torch.dtype,
    vae_dtype: torch.dtype,
    mesh: Mesh | None = None,
) -> Pipeline:
    """The whole model of that shape on this rank's device, placed as the plan's rung says (to `text`).

    Ranks that seeded alike hold the same weights.
    """
    step = RUNGS.index(plan.rung)
    if step > RUNGS.index("text"):
        raise ValueError(f"random models are made for the rungs down to text, not for {plan.rung}")
    dit, vae, text = meta_parts(shape)
    experts = [fill(dit, device, dtype, keep_fp32=True)]
    if shape.experts > 1:
        experts.append(fill(meta_parts(shape)[0], device, dtype, keep_fp32=True))
    fill(vae, device, vae_dtype)
    on_cpu = step >= RUNGS.index("text")
    fill(text.umt5, torch.device("cpu") if on_cpu else device, dtype)
    text.umt5.encoder.embed_tokens.weight = text.umt5.shared.weight
    encoder: PromptEncoder = HostTextEncoder(text, shape.dit.text_dim, device) if on_cpu else text
    attends = (pick_attend(kind, dtype, shape.dit.head_dim, device) for kind in ("self", "cross"))  # type: ignore[arg-type]
    high, low = experts[0], experts[1] if shape.experts > 1 else None
    pipeline = Pipeline(shape.spec, encoder, high, low, vae, mesh or Mesh.single(), device, *attends)  # type: ignore[arg-type]
    pipeline.branches_in_turn = step >= RUNGS.index("branches")
    return pipeline


class RandomState(Mapping[str, Tensor]):
    """A state dict whose tensors are made when they are asked for, so that a large one can be written."""

    def __init__(self, config: DiTConfig, device: torch.device) -> None:
        with torch.device("meta"):
            self.shapes = expected_shapes(DiT(config))
        self.device = device

    def __getitem__(self, name: str) -> Tensor:
        return random_tensor(name, self.shapes[name], torch.float32, self.device)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

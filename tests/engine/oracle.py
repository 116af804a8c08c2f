"""Diffusers' models with random weights, and ours with the same: the oracles of this folder's tests."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor, nn

from engine.config import DiTConfig, VAEConfig
from engine.diffusers_names import dit_name, vae21_name, vae22_name
from engine.dit import DiT
from engine.tiny import randomize
from engine.vae import VAE

TEXT_DIM, TEXT_LEN = 48, 20
M = TypeVar("M", bound=nn.Module)


def relative(got: Tensor, expected: Tensor) -> float:
    """|got - expected| / |expected|."""
    assert got.shape == expected.shape, (got.shape, expected.shape)
    return float((got - expected).norm() / expected.norm())


def twin_dits(
    generator: torch.Generator,
    in_channels: int = 16,
    out_channels: int = 16,
    layers: int = 2,
    eps: float = 1e-6,
) -> tuple[DiT, WanTransformer3DModel]:
    """Our DiT and diffusers', head dimension 128, with the same random weights."""
    theirs = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=128,
        in_channels=in_channels,
        out_channels=out_channels,
        text_dim=TEXT_DIM,
        freq_dim=256,
        ffn_dim=320,
        num_layers=layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        eps=eps,
    ).eval()
    randomize(theirs, generator)
    config = DiTConfig(256, 320, 2, layers, in_channels, out_channels, TEXT_DIM, TEXT_LEN, eps=eps)
    ours = build(DiT, config, {dit_name(name): tensor for name, tensor in theirs.state_dict().items()})
    return ours, theirs


@dataclass(frozen=True)
class TwinVAEs:
    """Our VAE and diffusers' with the same random weights, and the latents' statistics."""

    ours: VAE
    theirs: AutoencoderKLWan
    mean: Tensor
    std: Tensor

    def their_encode(self, video: Tensor) -> Tensor:
        """Normalised latents by diffusers."""
        return (self.theirs.encode(video).latent_dist.mode() - self.mean) / self.std

    def their_decode(self, latents: Tensor) -> Tensor:
        """The video by diffusers, clamped as it does."""
        return self.theirs.decode(latents * self.std + self.mean).sample


def twin_vaes(generator: torch.Generator, kind: str, z_dim: int = 16) -> TwinVAEs:
    """VAEs of the kind ("2.1" or "2.2")."""
    mean = torch.randn(z_dim, generator=generator)
    std = torch.rand(z_dim, generator=generator) + 0.5
    new = kind == "2.2"
    extra = (
        {
            "is_residual": True,
            "in_channels": 12,
            "out_channels": 12,
            "patch_size": 2,
            "scale_factor_spatial": 16,
            "decoder_base_dim": 12,
        }
        if new
        else {}
    )
    theirs = AutoencoderKLWan(
        base_dim=8,
        z_dim=z_dim,
        latents_mean=mean.tolist(),
        latents_std=std.tolist(),
        temperal_downsample=[False, True, True],
        **extra,
    ).eval()
    randomize(theirs, generator)
    name = vae22_name if new else vae21_name
    config = VAEConfig(
        "2.2" if new else "2.1",
        8,
        12 if new else 8,
        z_dim,
        tuple(mean.tolist()),
        tuple(std.tolist()),
        stride=(4, 16, 16) if new else (4, 8, 8),
    )
    ours = build(VAE, config, {name(key): tensor for key, tensor in theirs.state_dict().items()})
    return TwinVAEs(ours, theirs, mean.view(1, -1, 1, 1, 1), std.view(1, -1, 1, 1, 1))


def build(kind: Callable[[Any], M], config: object, state: dict[str, Tensor]) -> M:
    """A model with copies of these weights; every one must be used."""
    with torch.device("meta"):
        model = kind(config)
    model.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, strict=True, assign=True)
    return model.requires_grad_(False).eval()


def tensors_without_effect(
    model: nn.Module, output: Callable[[], Tensor], prefixes: tuple[str, ...] = ("",)
) -> list[str]:
    """Names of tensors that can be scaled by 1.5 without changing the output; there should be none."""
    before = output()
    idle = []
    for name, parameter in model.named_parameters():
        if not name.startswith(prefixes):
            continue
        original = parameter.data.clone()
        parameter.data.mul_(1.5)
        if relative(output(), before) < 1e-6:
            idle.append(name)
        parameter.data.copy_(original)
    assert torch.equal(output(), before)
    return idle

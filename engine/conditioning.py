"""What an input image adds to the denoising, and nothing where there is none.

Shapes: C channels, F H W latent frames, rows and columns.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.config import GenerationRequest, ModelSpec
from engine.vae import VAE


@dataclass(frozen=True)
class Conditioning:
    """The video's size and what the model sees beside the noise."""

    size: tuple[int, int]  # width, height in pixels of the video
    channels: Tensor | None = None  # I2V, [C, F, H, W]: goes behind the latents' channels at each step
    first_latent: Tensor | None = None  # TI2V, [C, 1, H, W]: stands in the first latent frame's place

    def pin(self, latents_CFHW: Tensor) -> Tensor:
        """The latents with the image in the first frame's place."""
        if self.first_latent is None:
            return latents_CFHW
        return torch.cat((self.first_latent, latents_CFHW[:, 1:]), dim=1)

    def model_input(self, latents_CFHW: Tensor) -> Tensor:
        """The latents with the image's channels behind them."""
        if self.channels is None:
            return latents_CFHW
        return torch.cat((latents_CFHW, self.channels))

    def timesteps(self, t: int, device: torch.device) -> Tensor:
        """[1, S]: t for all tokens, or 0 for the first latent frame's (it is clean) and t for the others."""
        return torch.tensor([[t] if self.first_latent is None else [0, t]], device=device)


def make_conditioning(request: GenerationRequest, spec: ModelSpec, vae: VAE) -> Conditioning:
    """The conditioning of a request; without an image, its size alone."""
    return Conditioning(request.size)

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
    channels_CFHW: Tensor | None = None  # I2V: appended to the latents' channels at every step
    first_C1HW: Tensor | None = None  # TI2V: stands in place of the first latent frame at every step

    def pin(self, latents_CFHW: Tensor) -> Tensor:
        """The latents with the image in the first frame's place."""
        if self.first_C1HW is None:
            return latents_CFHW
        return torch.cat((self.first_C1HW, latents_CFHW[:, 1:]), dim=1)

    def model_input(self, latents_CFHW: Tensor) -> Tensor:
        """The latents with the image's channels behind them."""
        if self.channels_CFHW is None:
            return latents_CFHW
        return torch.cat((latents_CFHW, self.channels_CFHW))

    def timesteps(self, t: int, device: torch.device) -> Tensor:
        """[1, S]: t for all tokens, or 0 for the first latent frame's (it is clean) and t for the others."""
        return torch.tensor([[t] if self.first_C1HW is None else [0, t]], device=device)


def make_conditioning(request: GenerationRequest, spec: ModelSpec, vae: VAE) -> Conditioning:
    """The conditioning of a request; without an image, its size alone."""
    return Conditioning(request.size)

"""What an input image adds to the denoising, and nothing where there is none.

Shapes: C channels, F H W latent frames, rows and columns.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.config import GenerationRequest, ModelSpec
from engine.images import Size, best_size, cover_and_crop, open_image, resize_bicubic, size_by_area
from engine.vae import VAE
from engine.vae_blocks import Space, WholeFrame

SpaceOf = Callable[[int, int], Space]


@dataclass(frozen=True)
class Conditioning:
    """The video's size and what the model sees beside the noise."""

    size: Size  # width, height in pixels of the video
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


def output_size(request: GenerationRequest, spec: ModelSpec) -> Size:
    """Width and height of the request's video: the asked ones, or its image's aspect at their area."""
    if request.image is None:
        return request.size
    return _size_for(open_image(request.image).size, request, spec)


def make_conditioning(
    request: GenerationRequest, spec: ModelSpec, vae: VAE, space: SpaceOf = lambda rows, columns: WholeFrame()
) -> Conditioning:
    """The conditioning of a request; without an image, its size alone.

    `space` tells how the ranks share a frame of so many rows and columns of latents.
    """
    if request.image is None:
        return Conditioning(request.size)
    image = open_image(request.image)
    size = _size_for(image.size, request, spec)
    if spec.task == "i2v":
        return Conditioning(
            size, channels=_image_channels(resize_bicubic(image, size), request.frame_num, vae, space)
        )
    return Conditioning(size, first_latent=_encode(cover_and_crop(image, size)[:, None], vae, space))


def _size_for(image: Size, request: GenerationRequest, spec: ModelSpec) -> Size:
    area = request.size[0] * request.size[1]
    stride, patch = spec.vae.stride[1], spec.dit.patch_size[1]
    if spec.task == "i2v":
        return size_by_area(image, area, stride, patch)
    return best_size(image, area, stride * patch)


def _image_channels(image_3HW: Tensor, frame_num: int, vae: VAE, space: SpaceOf) -> Tensor:
    """[4 + C, F, H, W]: a mask that is 1 on the first latent frame, then the latents of the image followed
    by empty (mid-grey) frames."""
    rest = image_3HW.new_zeros(3, frame_num - 1, *image_3HW.shape[1:])
    latents_CFHW = _encode(torch.cat((image_3HW[:, None], rest), dim=1), vae, space)
    mask_4FHW = torch.zeros_like(latents_CFHW[:1]).repeat(vae.config.stride[0], 1, 1, 1)
    mask_4FHW[:, 0] = 1
    return torch.cat((mask_4FHW, latents_CFHW))


def _encode(video_3THW: Tensor, vae: VAE, space: SpaceOf) -> Tensor:
    """Latents [C, F, H, W] fp32 on the VAE's device."""
    weight = next(vae.parameters())
    rows, columns = (size // vae.config.stride[1] for size in video_3THW.shape[2:])
    return vae.encode(video_3THW[None].to(weight.device, weight.dtype), space(rows, columns))[0].float()

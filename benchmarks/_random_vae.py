"""VAEs with random weights, whose pixels come out about as wide as a real one's."""

import torch
from torch import nn

from engine.config import VAEConfig
from engine.specs import LATENT_MEAN_21, LATENT_STD_21
from engine.vae import VAE


def random_vae(device: torch.device, dtype: torch.dtype | None = None) -> VAE:
    """The A14B models' VAE, in fp16 unless a dtype is given; on a CPU a narrow one, in fp32."""
    cuda = device.type == "cuda"
    torch.manual_seed(0)
    base = 96 if cuda else 8
    with torch.device(device):
        vae = VAE(VAEConfig("2.1", base, base, 16, LATENT_MEAN_21, LATENT_STD_21))
        for parameter in vae.parameters():
            if parameter.ndim > 1 and parameter.shape[0] > 1 and parameter[0].numel() > 1:
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    dtype = dtype or (torch.float16 if cuda else torch.float32)
    return vae.to(dtype).requires_grad_(False).eval()

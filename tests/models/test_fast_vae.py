"""The VAE's fast layers for training compute what the engine's do, forwards and backwards."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from engine.tiny import randomize
from engine.vae import VAE
from models.demo.train import fast_vae
from models.demo.train.common import VAE_CONFIG
from models.demo.train.train_vae import decode, encode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def vae() -> Iterator[VAE]:
    """The demo's VAE with random weights; the engine's layers are put back afterwards."""
    model = VAE(VAE_CONFIG)
    randomize(model, torch.Generator().manual_seed(3))
    yield model
    fast_vae.speed_up(False)


def test_whole_video_equals_the_engines_chunks(vae: VAE) -> None:
    """Encoder and decoder, frame 0's special case included."""
    video = torch.rand(1, 3, 9, 16, 24, generator=torch.Generator().manual_seed(4)) * 2 - 1
    with torch.no_grad():
        mean, _ = vae.encode_moments(video)
        picture = vae.decode(mean)
        fast_vae.speed_up()
        fast_mean, _ = encode(vae, video)
        fast_picture = decode(vae, mean)
    torch.testing.assert_close(fast_mean, mean, rtol=1e-4, atol=1e-4 * float(mean.abs().max()))
    torch.testing.assert_close(fast_picture, picture, rtol=1e-4, atol=1e-4 * float(picture.abs().max()))


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("channels", [16, 64])
def test_norm_kernel_equals_torch(silu: bool, channels: int) -> None:
    """Values and both gradients, with rows that don't fill the last block."""
    generator = torch.Generator().manual_seed(channels)
    x = torch.randn(301, channels, generator=generator).to(DEVICE).requires_grad_()
    gamma = torch.randn(channels, generator=generator).to(DEVICE).requires_grad_()
    dy = torch.randn(301, channels, generator=generator).to(DEVICE)
    y = nn.functional.normalize(x, dim=1) * channels**0.5 * gamma
    y = nn.functional.silu(y) if silu else y
    fast = fast_vae.NormSiLU.apply(x, gamma, silu)
    torch.testing.assert_close(fast, y, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(
        torch.autograd.grad(fast, (x, gamma), dy), torch.autograd.grad(y, (x, gamma), dy), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)

"""A tiny checkpoint with random weights, in the full official layout, made in seconds on a CPU.

It goes through the same loader as the real ones. Its videos are noise; they show that every part works.
"""

from pathlib import Path

import torch
from torch import nn

from engine.checkpoint_writer import build_tokenizer, write_checkpoint
from engine.config import DiTConfig, VAEConfig
from engine.dit import DiT
from engine.specs import LATENT_MEAN_21, LATENT_STD_21
from engine.text_encoder import TextEncoder
from engine.umt5 import umt5_config
from engine.vae import VAE

CORPUS = (
    "a cat walks on the grass, realistic style, the camera follows",
    "a small boat on a calm sea at sunset, waves, warm light",
    "two dancers turn slowly in a bright room, slow motion",
    "a red ball bounces over a wooden floor, close up",
    "镜头缓慢推进，一只白色的猫在草地上行走",
)
TINY_DIT = DiTConfig(dim=64, ffn_dim=128, num_heads=4, num_layers=2, text_dim=32, text_len=512, freq_dim=32)
TINY_VAE = VAEConfig("2.1", 8, 8, 16, LATENT_MEAN_21, LATENT_STD_21)
TINY_REEL = {
    "name": "tiny-t2v",
    "task": "t2v",
    "sizes": ["64*48", "48*64", "96*64", "128*96"],
    "frame_num": 9,
    "max_frame_num": 81,
    "sampling_steps": 4,
    "shift": 5.0,
    "guide_scale": [3.0, 4.0],
    "boundary": 0.875,
    "fps": 8,
}


def randomize(model: nn.Module, generator: torch.Generator) -> None:
    """Give every tensor random values that keep signals of order one: none is left at zero or one."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("gamma") or ("norm" in name and name.endswith("weight")):
                parameter.copy_(1 + 0.2 * noise)
            elif parameter.ndim > 1 and "modulation" not in name:
                parameter.copy_(noise / (parameter[0].numel() ** 0.5))
            else:
                parameter.copy_(0.2 * noise)


def make_tiny(folder: Path, seed: int = 0) -> Path:
    """Write the tiny T2V checkpoint into `folder` (two experts, UMT5 with its own tokenizer, VAE)."""
    generator = torch.Generator().manual_seed(seed)
    tokenizer = build_tokenizer(CORPUS, vocab_size=384)
    text = TextEncoder(umt5_config(384, TINY_DIT.text_dim, 32, 64, 4, 2), tokenizer)
    high, low, vae = DiT(TINY_DIT), DiT(TINY_DIT), VAE(TINY_VAE)
    for model in (high, low, vae, text):
        randomize(model, generator)
    write_checkpoint(
        Path(folder),
        dit=TINY_DIT,
        task="t2v",
        high=high.state_dict(),
        low=low.state_dict(),
        vae=vae.state_dict(),
        vae_kind="2.1",
        umt5=text.umt5.state_dict(),
        tokenizer=tokenizer,
        reel=TINY_REEL,
    )
    return Path(folder)

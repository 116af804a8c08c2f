"""Tiny checkpoints of the image models, in the official layout."""

from dataclasses import replace
from pathlib import Path

import torch

from engine.checkpoint_writer import build_tokenizer, write_checkpoint
from engine.config import Task
from engine.dit import DiT
from engine.text_encoder import TextEncoder
from engine.tiny import CORPUS, TINY_DIT, randomize
from engine.umt5 import umt5_config
from engine.vae import VAE
from tests.engine.oracle import twin_vaes

SIZES: dict[Task, list[str]] = {"i2v": ["64*96", "64*80"], "ti2v": ["64*96"]}


def write_image_model(folder: Path, task: Task, generator: torch.Generator) -> Path:
    """I2V (two experts, the 2.1 VAE) or TI2V (one, the 2.2 VAE), random weights."""
    new = task == "ti2v"
    vae: VAE = twin_vaes(generator, "2.2" if new else "2.1", 48 if new else 16).ours
    channels = (48, 48) if new else (36, 16)
    config = replace(TINY_DIT, in_channels=channels[0], out_channels=channels[1])
    experts = [DiT(config) for _ in range(1 if new else 2)]
    tokenizer = build_tokenizer(CORPUS, 384)
    text = TextEncoder(umt5_config(384, config.text_dim, 32, 64, 4, 1), tokenizer)
    for model in (*experts, text):
        randomize(model, generator)
    write_checkpoint(
        folder,
        dit=config,
        task=task,
        high=experts[0].state_dict(),
        low=None if new else experts[1].state_dict(),
        vae=vae.state_dict(),
        vae_kind=vae.config.kind,
        umt5=text.umt5.state_dict(),
        tokenizer=tokenizer,
        reel={"sizes": SIZES[task], "frame_num": 5, "max_frame_num": 9},
    )
    return folder

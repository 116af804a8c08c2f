"""Tiny checkpoints in the diffusers layout, saved by diffusers itself."""

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import UMT5EncoderModel

from engine.checkpoint_writer import build_tokenizer
from engine.config import Task
from engine.tiny import CORPUS, randomize
from engine.umt5 import umt5_config
from tests.engine.oracle import TEXT_DIM, twin_dits, twin_vaes

REEL = {"name": "saved", "sizes": ["96*64"], "frame_num": 5, "fps": 8}


def save_model(
    folder: Path, generator: torch.Generator, task: Task, with_image: bool = False
) -> WanPipeline | WanImageToVideoPipeline:
    """A member of the family with random weights: T2V and I2V have two experts, TI2V has one."""
    new = task == "ti2v"
    channels, kind = (48, "2.2") if new else (16, "2.1")
    inputs = 36 if task == "i2v" else channels
    dits = [twin_dits(generator, inputs, channels, layers=1)[1] for _ in range(1 if new else 2)]
    return save(folder, generator, dits, twin_vaes(generator, kind, channels).theirs, with_image)


def save(
    folder: Path,
    generator: torch.Generator,
    dits: list[WanTransformer3DModel],
    vae: AutoencoderKLWan,
    with_image: bool = False,
) -> WanPipeline | WanImageToVideoPipeline:
    """A whole pipeline of diffusers, saved as it saves; the kind of pipeline that takes an image or not."""
    text = UMT5EncoderModel(umt5_config(384, TEXT_DIM, 48, 64, 4, 2)).eval()
    randomize(text, generator)
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0
    )
    kind = WanImageToVideoPipeline if with_image else WanPipeline
    pipeline = kind(
        tokenizer=build_tokenizer(CORPUS, 384),
        text_encoder=text,
        vae=vae,
        scheduler=scheduler,
        transformer=dits[0],
        transformer_2=dits[1] if len(dits) == 2 else None,
        boundary_ratio=0.8 if len(dits) == 2 else None,
        expand_timesteps=len(dits) == 1,
    )
    pipeline.save_pretrained(folder, max_shard_size="300KB")
    (folder / "reel.json").write_text(json.dumps(REEL))
    return pipeline

"""Tiny checkpoints in the diffusers layout, saved by diffusers, and the same weights in the official one."""

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

from engine.checkpoint_writer import build_tokenizer, write_checkpoint
from engine.config import DiTConfig, Task
from engine.diffusers_names import dit_name, vae21_name, vae22_name
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
    for parameter in text.parameters():  # the official layout's text encoder is stored in bf16
        parameter.data = parameter.data.bfloat16().float()
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


def save_official(folder: Path, pipeline: WanPipeline | WanImageToVideoPipeline, task: Task) -> None:
    """The weights of a pipeline of diffusers in the official layout."""
    experts = [dit for dit in (pipeline.transformer, pipeline.transformer_2) if dit is not None]
    states = [{dit_name(name): tensor for name, tensor in dit.state_dict().items()} for dit in experts]
    new, config, vae = task == "ti2v", experts[0].config, pipeline.vae
    vae_name = vae22_name if new else vae21_name
    reel = {"latent_mean": vae.config.latents_mean, "latent_std": vae.config.latents_std}
    if not new:
        reel["boundary"] = pipeline.config.boundary_ratio
    write_checkpoint(
        folder,
        dit=DiTConfig(
            config.num_attention_heads * config.attention_head_dim, config.ffn_dim,
            config.num_attention_heads, config.num_layers, config.in_channels, config.out_channels,
            config.text_dim,
        ),
        task=task,
        high=states[0],
        low=None if new else states[1],
        vae={vae_name(name): tensor for name, tensor in vae.state_dict().items()},
        vae_kind="2.2" if new else "2.1",
        umt5=pipeline.text_encoder.state_dict(),
        tokenizer=pipeline.tokenizer,
        reel=REEL | reel,
    )  # fmt: skip

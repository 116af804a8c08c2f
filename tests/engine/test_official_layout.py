"""I2V-A14B's and TI2V-5B's official layouts on disk: written, loaded, run with an image."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine.checkpoint_writer import build_tokenizer, write_checkpoint
from engine.config import Task
from engine.dit import DiT
from engine.load import load_pipeline
from engine.requests import resolve
from engine.text_encoder import TextEncoder
from engine.tiny import CORPUS, TINY_DIT, randomize
from engine.umt5 import umt5_config
from engine.vae import VAE
from tests.engine.oracle import twin_vaes
from tests.engine.sinks import Frames


@pytest.mark.parametrize("task", ["i2v", "ti2v"])
def test_image_models_load_and_run(generator: torch.Generator, tmp_path: Path, task: Task) -> None:
    new = task == "ti2v"
    vae: VAE = twin_vaes(generator, "2.2" if new else "2.1", 48 if new else 16).ours
    channels = (48, 48) if new else (36, 16)
    config = replace(TINY_DIT, in_channels=channels[0], out_channels=channels[1])
    experts = [DiT(config) for _ in range(1 if new else 2)]
    tokenizer = build_tokenizer(CORPUS, 384)
    text = TextEncoder(umt5_config(384, config.text_dim, 32, 64, 4, 1), tokenizer)
    for model in (*experts, text):
        randomize(model, generator)
    folder = tmp_path / "checkpoint"
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
        reel={"sizes": ["64*96"], "frame_num": 5, "max_frame_num": 5},
    )
    pipeline = load_pipeline(folder, device="cpu")
    assert (pipeline.spec.task, pipeline.spec.vae.kind, pipeline.low is None) == (task, vae.config.kind, new)
    Image.new("RGB", (60, 40), (250, 10, 10)).save(tmp_path / "image.png")

    def video(image: Path | None) -> np.ndarray:
        sink = Frames()
        request = resolve(pipeline.spec, "a boat", seed=1, sampling_steps=2, image=image)
        pipeline.generate(request, sink)
        return sink.video

    assert video(tmp_path / "image.png").shape == (5, 64, 96, 3)  # the image's aspect at the asked area
    if new:
        assert video(None).shape == (5, 96, 64, 3)

"""I2V-A14B's and TI2V-5B's official layouts on disk: written, loaded, run with an image."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine.config import Task
from engine.load import load_pipeline
from engine.requests import resolve
from tests.engine.checkpoints import write_image_model
from tests.engine.sinks import Frames


@pytest.mark.parametrize("task", ["i2v", "ti2v"])
def test_image_models_load_and_run(generator: torch.Generator, tmp_path: Path, task: Task) -> None:
    new = task == "ti2v"
    pipeline = load_pipeline(write_image_model(tmp_path / "checkpoint", task, generator), device="cpu")
    kind = "2.2" if new else "2.1"
    assert (pipeline.spec.task, pipeline.spec.vae.kind, pipeline.low is None) == (task, kind, new)
    Image.new("RGB", (60, 40), (250, 10, 10)).save(tmp_path / "image.png")

    def video(image: Path | None) -> np.ndarray:
        sink = Frames()
        request = resolve(pipeline.spec, "a boat", seed=1, sampling_steps=2, image=image)
        pipeline.generate(request, sink)
        return sink.video

    assert video(tmp_path / "image.png").shape == (5, 64, 96, 3)  # the image's aspect at the asked area
    if new:
        assert video(None).shape == (5, 96, 64, 3)

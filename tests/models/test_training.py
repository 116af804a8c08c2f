"""The training commands, a few steps each on a CPU: what they leave is a checkpoint that the engine takes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.load import load_pipeline
from engine.requests import resolve
from models.demo.frames import Frames
from models.demo.train.common import MODEL_DIR
from models.demo.train.tokenizer import save_tokenizer

ROOT = Path(__file__).parents[2]
COMMANDS = (
    ("train_vae", "--max-steps", "2", "--batch", "2"),
    ("train_text", "--max-steps", "2", "--batch", "8"),
    ("train_classifier", "--max-steps", "2", "--batch", "4"),
    ("train_experts", "--max-steps", "2", "--batch", "2", "--clips", "3", "--big-clips", "0", "--no-compile"),
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the four commands write, one after another."""
    folder = tmp_path_factory.mktemp("trained")
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    for name, *flags in COMMANDS:
        command = [sys.executable, "-m", f"models.demo.train.{name}", "--out", str(folder), *flags]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{name}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return folder


def test_commands_leave_a_checkpoint_that_the_engine_serves(checkpoint: Path) -> None:
    """The engine's loader takes every tensor, and the pipeline makes a clip."""
    facts = json.loads((checkpoint / "reel.json").read_text())
    assert facts["negative_prompt"] == "", "the prompt that training drops texts to"
    assert len(facts["latent_mean"]) == len(facts["latent_std"]) == 16
    pipeline = load_pipeline(checkpoint)
    sink = Frames()
    request = resolve(pipeline.spec, "A red circle", size=(128, 128), frame_num=5, sampling_steps=2, seed=1)
    pipeline.generate(request, sink)
    frames = sink.array()
    assert frames.shape == (5, 128, 128, 3)
    assert frames.std() > 0


def test_every_part_wrote_its_loss_curve(checkpoint: Path) -> None:
    """Each with its last step."""
    for name in ("vae", "text", "classifier", "high", "low"):
        curve = json.loads((checkpoint / "train" / "curves" / f"{name}.json").read_text())["curve"]
        assert curve[-1]["step"] == 2, name
        assert all(np.isfinite(list(row.values())).all() for row in curve), name


def test_resuming_starts_from_the_saved_weights(checkpoint: Path, tmp_path: Path) -> None:
    """With a rate of nothing, resumed weights stay what they were."""
    path = checkpoint / "models_t5_umt5-xxl-enc-bf16.pth"
    before = torch.load(path, weights_only=True)
    command = [sys.executable, "-m", "models.demo.train.train_text", "--out", str(checkpoint), "--resume"]
    command += ["--max-steps", "1", "--batch", "4", "--lr", "1e-12"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    after = torch.load(path, weights_only=True)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_the_tokenizer_that_ships_is_the_one_training_makes(tmp_path: Path) -> None:
    """Its words are the captions' words, in the same order."""
    save_tokenizer(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        made = (tmp_path / "google" / "umt5-xxl" / name).read_text()
        assert json.loads(made) == json.loads((MODEL_DIR / "google" / "umt5-xxl" / name).read_text()), name

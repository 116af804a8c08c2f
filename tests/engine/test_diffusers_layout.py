"""Checkpoints in the diffusers layout, saved by diffusers, loaded by us: the same video from a prompt."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file
from transformers import UMT5EncoderModel

from engine.checkpoint_writer import build_tokenizer
from engine.errors import CheckpointError
from engine.load import load_pipeline
from engine.requests import resolve
from engine.sampler import make_schedule
from engine.tiny import CORPUS, randomize
from engine.umt5 import umt5_config
from tests.engine.oracle import TEXT_DIM, relative, twin_dits, twin_vaes
from tests.engine.schedulers import with_sigmas
from tests.engine.sinks import Frames

REEL = {"name": "saved", "sizes": ["96*64"], "frame_num": 5, "fps": 8}


def save(
    folder: Path, generator: torch.Generator, dits: list[WanTransformer3DModel], vae: AutoencoderKLWan
) -> WanPipeline:
    """A whole pipeline of diffusers, saved as it saves."""
    text = UMT5EncoderModel(umt5_config(384, TEXT_DIM, 48, 64, 4, 2)).eval()
    randomize(text, generator)
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0
    )
    boundary = {"boundary_ratio": 0.8} if len(dits) == 2 else {"expand_timesteps": True}
    pipeline = WanPipeline(build_tokenizer(CORPUS, 384), text, vae, scheduler, *dits, **boundary)
    pipeline.save_pretrained(folder, max_shard_size="300KB")
    (folder / "reel.json").write_text(json.dumps(REEL))
    return pipeline


@pytest.mark.parametrize("experts", [1, 2])
def test_a_saved_pipeline_makes_the_same_video(
    generator: torch.Generator, tmp_path: Path, experts: int
) -> None:
    channels, kind = (16, "2.1") if experts == 2 else (48, "2.2")
    dits = [twin_dits(generator, channels, channels, layers=1)[1] for _ in range(experts)]
    oracle = save(tmp_path / "saved", generator, dits, twin_vaes(generator, kind, channels).theirs)
    assert len(list((tmp_path / "saved" / "transformer").glob("*.safetensors"))) > 1

    ours = load_pipeline(tmp_path / "saved", device="cpu")
    assert (ours.spec.name, ours.spec.boundary) == ("saved", 0.8 if experts == 2 else None)
    assert ours.spec.vae.latent_mean == pytest.approx(oracle.vae.config.latents_mean)
    request = resolve(ours.spec, "a cat  walks &amp; jumps", seed=5, sampling_steps=4, guide_scale=(2.0,))
    ours.generate(request, Frames(), latents_out=tmp_path / "latents.safetensors")

    with_sigmas(oracle.scheduler, make_schedule("unipc", 4, request.shift))
    oracle.set_progress_bar_config(disable=True)
    expected = oracle(
        prompt=request.prompt,
        negative_prompt=ours.spec.negative_prompt,
        height=64,
        width=96,
        num_frames=5,
        num_inference_steps=4,
        guidance_scale=2.0,
        latents=ours.noise(request, (96, 64))[None],
        output_type="latent",
    ).frames[0]
    error = relative(load_file(tmp_path / "latents.safetensors")["latents"], expected)
    print(f"relative error {error:.2e}")
    assert error < 1e-4


def test_what_is_missing_is_named(generator: torch.Generator, tmp_path: Path) -> None:
    dit = twin_dits(generator, 48, 48, layers=1)[1]
    save(tmp_path, generator, [dit], twin_vaes(generator, "2.2", 48).theirs)
    index = next((tmp_path / "transformer").glob("*.index.json"))
    shard = next(iter(json.loads(index.read_text())["weight_map"].values()))
    (tmp_path / "transformer" / shard).unlink()
    with pytest.raises(CheckpointError, match=shard):
        load_pipeline(tmp_path, device="cpu")
    (tmp_path / "vae" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"vae/config\.json is not there"):
        load_pipeline(tmp_path, device="cpu")

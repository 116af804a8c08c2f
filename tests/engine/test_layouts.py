"""Both layouts against diffusers: what it saves, and the same weights laid out as the official ones are."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from engine.config import Task
from engine.errors import CheckpointError
from engine.images import cover_and_crop, resize_bicubic
from engine.load import load_pipeline
from engine.requests import resolve
from engine.sampler import make_schedule
from tests.engine.oracle import relative, twin_dits, twin_vaes
from tests.engine.saved import save, save_model, save_official
from tests.engine.schedulers import with_sigmas
from tests.engine.sinks import Frames


@pytest.mark.filterwarnings("ignore:Passing `image` as torch tensor")  # bicubic leaves [0, 1]
@pytest.mark.parametrize(
    ("task", "with_image"), [("t2v", False), ("ti2v", False), ("i2v", True), ("ti2v", True)]
)
def test_a_saved_pipeline_makes_the_same_video_from_both_layouts(
    generator: torch.Generator, tmp_path: Path, task: Task, with_image: bool
) -> None:
    oracle = save_model(tmp_path / "saved", generator, task, with_image)
    assert len(list((tmp_path / "saved" / "transformer").glob("*.safetensors"))) > 1

    ours = load_pipeline(tmp_path / "saved", device="cpu")
    boundary = None if task == "ti2v" else 0.8
    assert (ours.spec.name, ours.spec.task, ours.spec.boundary) == ("saved", task, boundary)
    assert ours.spec.vae.latent_mean == pytest.approx(oracle.vae.config.latents_mean)
    path = tmp_path / "image.png" if with_image else None
    if path is not None:
        pixels = torch.randint(0, 256, (10, 12, 3), generator=generator, dtype=torch.uint8).numpy()
        Image.fromarray(pixels).resize((50, 40), Image.Resampling.BICUBIC).save(path)
    prompt = "a cat  walks &amp; jumps"
    request = resolve(ours.spec, prompt, seed=5, sampling_steps=4, guide_scale=(2.0,), image=path)
    made = ours.generate(request, Frames(), latents_out=tmp_path / "latents.safetensors")
    size = (made.width, made.height)
    assert size == ((80, 64) if task == "i2v" else (96, 64))

    with_sigmas(oracle.scheduler, make_schedule("unipc", 4, request.shift))
    oracle.set_progress_bar_config(disable=True)
    picture = {} if path is None else {"image": prepared(path, task, size)}
    expected = oracle(
        prompt=request.prompt,
        negative_prompt=ours.spec.negative_prompt,
        height=size[1],
        width=size[0],
        num_frames=5,
        num_inference_steps=4,
        guidance_scale=2.0,
        latents=ours.noise(request, size)[None],
        output_type="latent",
        **picture,
    ).frames[0]
    latents = load_file(tmp_path / "latents.safetensors")["latents"]
    error = relative(latents, expected)
    print(f"relative error {error:.2e}")
    assert error < 1e-4

    save_official(tmp_path / "official", oracle, task)
    official = load_pipeline(tmp_path / "official", device="cpu")
    assert official.spec == ours.spec
    official.generate(request, Frames(), latents_out=tmp_path / "official.safetensors")
    assert torch.equal(load_file(tmp_path / "official.safetensors")["latents"], latents)


def prepared(path: Path, task: Task, size: tuple[int, int]) -> torch.Tensor:
    """The image at the video's size, as the official code makes it: diffusers' own resizing differs."""
    image = Image.open(path).convert("RGB")
    if task == "i2v":
        return resize_bicubic(image, size)[None]
    return (cover_and_crop(image, size)[None] + 1) / 2


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

"""From a request to frames, against diffusers' pipelines: same weights, embeddings, noise and sigmas."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
)
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from engine.config import GenerationRequest, ModelSpec, Solver, Task
from engine.dit import DiT
from engine.images import cover_and_crop, resize_bicubic
from engine.parallel.mesh import Mesh
from engine.pipeline import Pipeline
from engine.requests import resolve
from engine.sampler import make_schedule
from tests.engine.oracle import TEXT_DIM, TEXT_LEN, TwinVAEs, relative, twin_dits, twin_vaes
from tests.engine.schedulers import with_sigmas
from tests.engine.sinks import Frames

SIZE = (96, 64)  # width, height
STEPS, SHIFT, FRAMES = 5, 5.0, 9
GUIDE = (2.0, 3.5)  # low-noise, high-noise


class GivenEmbeddings(torch.nn.Module):
    """A text encoder that knows two prompts."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.known = {
            prompt: torch.randn(TEXT_LEN, TEXT_DIM, generator=generator) for prompt in ("good", "bad")
        }

    def encode_all(self, prompts: Sequence[str], mesh: Mesh) -> list[Tensor]:
        return [self.known[prompt] for prompt in prompts]


def their_scheduler(solver: Solver) -> object:
    kind, extra = (
        (UniPCMultistepScheduler, {})
        if solver == "unipc"
        else (DPMSolverMultistepScheduler, {"final_sigmas_type": "zero"})
    )
    oracle = kind(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0, **extra)
    return with_sigmas(oracle, make_schedule(solver, STEPS, SHIFT))


def our_pipeline(task: Task, high: DiT, low: DiT | None, vaes: TwinVAEs, text: GivenEmbeddings) -> Pipeline:
    spec = ModelSpec(
        name="twin",
        task=task,
        dit=high.config,
        vae=vaes.ours.config,
        boundary=None if low is None else 0.9,
        shift=SHIFT,
        sampling_steps=STEPS,
        guide_scale=GUIDE,
        fps=8,
        frame_num=FRAMES,
        max_frame_num=FRAMES,
        sizes=(SIZE,),
        negative_prompt="bad",
    )
    return Pipeline(spec, text, high, low, vaes.ours, Mesh.single(), torch.device("cpu"))  # type: ignore[arg-type]


def compare(
    pipeline: Pipeline,
    request: GenerationRequest,
    theirs: object,
    vae: AutoencoderKLWan,
    folder: Path,
    **more: object,
) -> None:
    """Ours and diffusers' latents within 1e-4, frames within one level of 255."""
    sink = Frames()
    result = pipeline.generate(request, sink, latents_out=folder / "latents.safetensors")
    size = (result.width, result.height)
    good, bad = pipeline.text_encoder.encode_all(("good", "bad"), pipeline.mesh)
    common = {
        "prompt_embeds": good[None],
        "negative_prompt_embeds": bad[None],
        "height": size[1],
        "width": size[0],
        "num_frames": FRAMES,
        "num_inference_steps": STEPS,
        "guidance_scale": request.guide_scale[1],
        "latents": pipeline.noise(request, size)[None],
        "output_type": "latent",
        **more,
    }
    theirs.set_progress_bar_config(disable=True)  # type: ignore[attr-defined]
    latents = theirs(**common).frames  # type: ignore[operator]
    error = relative(load_file(folder / "latents.safetensors")["latents"], latents[0])
    print(f"relative error of the latents {error:.2e}")
    assert error < 1e-4
    config = vae.config
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1) for values in (config.latents_mean, config.latents_std)
    )
    with torch.no_grad():
        video = vae.decode(latents * std + mean).sample[0]
    expected = ((video.clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 3, 0).numpy()
    assert np.abs(sink.video.astype(float) - expected).max() <= 1
    assert np.ptp(sink.video) > 100  # a picture, not one grey


@pytest.mark.filterwarnings("ignore:__array__ implementation")
@pytest.mark.parametrize("solver", ["unipc", "dpm++"])
def test_t2v_with_two_experts(generator: torch.Generator, tmp_path: Path, solver: Solver) -> None:
    high, their_high = twin_dits(generator, layers=1)
    low, their_low = twin_dits(generator, layers=1)
    vaes = twin_vaes(generator, "2.1")
    pipeline = our_pipeline("t2v", high, low, vaes, GivenEmbeddings(generator))
    request = resolve(pipeline.spec, "good", seed=7, solver=solver)
    # t runs over 999 (or 1000), 952, ... 555: both sides of the boundary at 900
    timesteps = make_schedule(solver, STEPS, SHIFT).timesteps
    assert 2 <= (timesteps >= 900).sum() <= STEPS - 2
    theirs = WanPipeline(
        None, None, vaes.theirs, their_scheduler(solver), their_high, their_low, boundary_ratio=0.9
    )
    compare(pipeline, request, theirs, vaes.theirs, tmp_path, guidance_scale_2=GUIDE[0])


def picture(folder: Path, generator: torch.Generator) -> Path:
    """A 50 x 40 picture: its aspect is not the requested size's."""
    pixels = torch.randint(0, 256, (10, 12, 3), generator=generator, dtype=torch.uint8).numpy()
    path = folder / "image.png"
    Image.fromarray(pixels).resize((50, 40), Image.Resampling.BICUBIC).save(path)
    return path


@pytest.mark.filterwarnings("ignore:Passing `image` as torch tensor")  # bicubic leaves [0, 1]
def test_i2v_with_two_experts(generator: torch.Generator, tmp_path: Path) -> None:
    high, their_high = twin_dits(generator, 36, 16, layers=1)
    low, their_low = twin_dits(generator, 36, 16, layers=1)
    vaes = twin_vaes(generator, "2.1")
    pipeline = our_pipeline("i2v", high, low, vaes, GivenEmbeddings(generator))
    image = picture(tmp_path, generator)
    request = resolve(pipeline.spec, "good", seed=7, image=image)
    theirs = WanImageToVideoPipeline(
        None, None, vaes.theirs, their_scheduler("unipc"),
        transformer=their_high, transformer_2=their_low, boundary_ratio=0.9,
    )  # fmt: skip
    # Area 96 * 64 = 6144 at 40/50: 70.1 high, 87.6 wide, so 64 and 80.
    resized = resize_bicubic(Image.open(image).convert("RGB"), (80, 64))[None]
    compare(pipeline, request, theirs, vaes.theirs, tmp_path, image=resized, guidance_scale_2=GUIDE[0])


@pytest.mark.parametrize("with_image", [False, True])
def test_ti2v_with_the_new_vae(generator: torch.Generator, tmp_path: Path, with_image: bool) -> None:
    dit, their_dit = twin_dits(generator, 48, 48, layers=1)
    vaes = twin_vaes(generator, "2.2", z_dim=48)
    pipeline = our_pipeline("ti2v", dit, None, vaes, GivenEmbeddings(generator))
    image = picture(tmp_path, generator) if with_image else None
    request = resolve(pipeline.spec, "good", seed=7, image=image, guide_scale=(3.0,))
    if image is None:
        theirs = WanPipeline(
            None, None, vaes.theirs, their_scheduler("unipc"), their_dit, expand_timesteps=True
        )
        compare(pipeline, request, theirs, vaes.theirs, tmp_path)
        return
    theirs = WanImageToVideoPipeline(
        None, None, vaes.theirs, their_scheduler("unipc"), transformer=their_dit, expand_timesteps=True
    )
    # 6144 at 50/40: 87.6 x 70.1; width first gives 64 x 96, height first 96 x 64: the ratio 1.25 is
    # nearer 1.5 than 0.67.
    cropped = cover_and_crop(Image.open(image).convert("RGB"), (96, 64))[None]
    compare(pipeline, request, theirs, vaes.theirs, tmp_path, image=(cropped + 1) / 2)

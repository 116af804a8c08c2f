"""200 small jobs in one process: every model, mixed shapes, options, cancels and failures; nothing may grow.

Every tenth job is the same request, and must give the same video to the bit, whatever went before it.
"""

import ctypes
import gc
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from engine.config import Canceled, GenerationRequest, LoraUse, Task
from engine.errors import OutOfMemory, RequestError
from engine.load import load_pipeline
from engine.pipeline import Pipeline
from engine.requests import resolve
from tests.engine.loras import write_lora
from tests.engine.sinks import Frames

JOBS, SETTLED, EVERY = 200, 60, 10
MOST_KIB_A_JOB = 24.0  # of a job's own tensors, tens of megabytes: one kept activation would be far more


SIZES: dict[Task, list[str]] = {
    "t2v": ["16*16", "32*16", "16*48", "48*32"],
    "i2v": ["32*32", "32*48"],
    "ti2v": ["32*32", "64*32"],
}
Family = dict[Task, Pipeline]


@pytest.fixture(scope="module")
def lively(tiny: Path, image_models: dict[Task, Path], tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Every model of the family, small sizes only; T2V with a LoRA."""
    place, family = tmp_path_factory.mktemp("lively"), Family()
    for task, model in {"t2v": tiny, **image_models}.items():
        folder = Path(shutil.copytree(model, place / task))
        reel = json.loads((folder / "reel.json").read_text())
        (folder / "reel.json").write_text(json.dumps(reel | {"sizes": SIZES[task], "max_frame_num": 9}))
        family[task] = load_pipeline(folder, device="cpu")
    write_lora(place / "t2v" / "loras" / "style.safetensors", family["t2v"].high)
    family["t2v"] = load_pipeline(place / "t2v", device="cpu")
    return family


def resident() -> int:
    """Bytes of this process in memory, after everything that can go has gone."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(psutil.Process().memory_info().rss)


def tensors() -> int:
    """Bytes of all tensors that Python can reach."""
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def a_request(pipeline: Pipeline, rng: random.Random, picture: Path) -> GenerationRequest:
    """Any options that the model has; an image where it needs one, or may have one."""
    task = pipeline.spec.task
    uses = [(), (), (), (LoraUse("style", 0.5),), (LoraUse("style", 1.0, "low"),)] if task == "t2v" else [()]
    images = {"t2v": [None], "i2v": [picture], "ti2v": [None, picture]}
    return resolve(
        pipeline.spec,
        rng.choice(["a cat", "two dancers turn slowly", "一只白色的猫 &amp; more " * 20]),
        size=rng.choice(pipeline.spec.sizes),
        frame_num=rng.choice([1, 5, 9]),
        sampling_steps=rng.choice([1, 2, 3]),
        shift=rng.choice([1.0, 5.0, 12.0]),
        guide_scale=rng.choice([(1.0,), (3.0,), (1.0, 4.0), (3.0, 1.0)]),
        seed=rng.randrange(2**32),
        solver=rng.choice(["unipc", "dpm++"]),
        negative_prompt=rng.choice(["", "blurry"]),
        loras=rng.choice(uses),
        image=rng.choice(images[task]),
    )


def one_job(family: Family, rng: random.Random, picture: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A job that ends well, is canceled, is refused, fails in its sink, or runs out of memory somewhere."""
    pipeline = family[rng.choice(["t2v", "t2v", "t2v", "i2v", "ti2v"])]
    request = a_request(pipeline, rng, picture)
    fate = rng.choice(["done"] * 6 + ["cancel", "memory", "sink", "refused"])
    if fate == "cancel":
        questions = iter([False] * rng.randrange(4) + [True] * 99)
        with pytest.raises(Canceled):
            pipeline.generate(request, Frames(), should_cancel=lambda: next(questions))
    elif fate == "memory":
        place = rng.choice([pipeline.high, pipeline.vae.decoder, pipeline.text_encoder.umt5])  # type: ignore[attr-defined]
        name = "stream" if place is pipeline.vae.decoder else "forward"
        with monkeypatch.context() as patch:
            patch.setattr(place, name, out_of_memory)
            with pytest.raises(OutOfMemory, match=r"ran out of memory at .*7 GiB"):
                pipeline.generate(replace(request, shift=12.0), Frames())  # the high-noise expert begins
    elif fate == "sink":
        with pytest.raises(BrokenPipeError):
            pipeline.generate(request, Broken())
    elif fate == "refused":
        with pytest.raises(RequestError):
            pipeline.generate(replace(request, loras=(LoraUse("none"),)), Frames())
    else:
        pipeline.generate(request, Frames())
    return fate


def out_of_memory(*_: object, **__: object) -> None:
    held = torch.zeros(1000, 100)  # what a failing forward holds must go with it
    raise torch.OutOfMemoryError(f"tried to allocate 7 GiB beside {held.nbytes}")


class Broken:
    """A sink whose ffmpeg is gone."""

    def write(self, frames: np.ndarray) -> None:
        raise BrokenPipeError("ffmpeg is gone")


def known_videos(family: Family, picture: Path) -> dict[Task, np.ndarray]:
    """The same request each time, of every model."""
    videos = {}
    for task, pipeline in family.items():
        request = resolve(
            pipeline.spec, "a cat", frame_num=5, sampling_steps=4, shift=1.0, seed=1,
            image=None if task == "t2v" else picture,
        )  # fmt: skip
        sink = Frames()
        pipeline.generate(request, sink)
        videos[task] = sink.video
    return videos


def test_two_hundred_jobs_leave_nothing(
    lively: Family, picture: Path, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = known_videos(lively, picture)
    fates: dict[str, int] = {}
    numbers, sizes, held = [], [], []
    for number in range(JOBS):
        fate = one_job(lively, rng, picture, monkeypatch)
        fates[fate] = fates.get(fate, 0) + 1
        if number % EVERY == EVERY - 1:
            for task, video in known_videos(lively, picture).items():
                assert np.array_equal(video, expected[task]), f"{task}, job {number}, after {fate}"
            if number >= SETTLED:
                numbers.append(number)
                sizes.append(resident())
                held.append(tensors())
    slope = float(np.polyfit(numbers, sizes, 1)[0])
    tensor_slope = float(np.polyfit(numbers, held, 1)[0])
    print(
        f"{JOBS} jobs {fates}: resident memory {sizes[0] / 2**20:.0f} to {sizes[-1] / 2**20:.0f} MiB, "
        f"slope {slope / 1024:.2f} KiB a job; tensors {held[0] / 2**20:.2f} to {held[-1] / 2**20:.2f} MiB, "
        f"slope {tensor_slope:.1f} bytes a job"
    )
    assert min(fates.get(fate, 0) for fate in ("done", "cancel", "memory", "sink", "refused")) > 5
    assert held[-1] <= held[0] * 1.02
    assert slope < MOST_KIB_A_JOB * 1024

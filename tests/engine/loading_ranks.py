"""One of two gloo ranks that load and run: see `main` for the arguments."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from engine.checksums import verify
from engine.config import LoraUse
from engine.errors import CheckpointError
from engine.footprint import LiveBytes, decoding_bytes
from engine.layout import find_layout
from engine.load import load_pipeline
from engine.loader import Loader
from engine.memory import stripe
from engine.offload import PromptEncoder
from engine.parallel.mesh import Mesh
from engine.pipeline import Pipeline
from engine.requests import resolve
from engine.transfer import Meter
from engine.weights import Reader
from tests.engine.ranks import cached_latents
from tests.engine.sinks import Frames

LORA = LoraUse("style", 0.7)
SIZE = (48, 48)  # with 9 frames 3 x 3 x 3 = 27 tokens: odd, so padded over two ranks


def video(pipeline: Pipeline, *loras: LoraUse) -> np.ndarray:
    """Both experts work (t = 999, 749, 499, 249), on an odd number of tokens."""
    request = resolve(
        pipeline.spec, "a cat", size=SIZE, frame_num=9, sampling_steps=4, shift=1.0, seed=3, loras=loras
    )
    sink = Frames()
    pipeline.generate(request, sink)
    return sink.video if sink.chunks else np.zeros(0, np.uint8)


def eight_bit_video(pipeline: Pipeline) -> np.ndarray:
    """Under `8bit`, which computes in 8 bits whatever the checkpoint's reel.json says."""
    request = resolve(
        pipeline.spec, "a cat", size=SIZE, frame_num=5, sampling_steps=2, shift=1.0, seed=3, quality="8bit"
    )
    sink = Frames()
    pipeline.generate(request, sink)
    return sink.video if sink.chunks else np.zeros(0, np.uint8)


def photo_video(pipeline: Pipeline, image: Path) -> np.ndarray:
    """Of a 4:3 picture. I2V: 3 x 3 x 5 = 45 tokens, of which a rank holds 23, padded.

    TI2V: 3 x 2 x 3 = 18, of which the clean first 6 are all on rank 0, among 3 of its others.
    """
    i2v = pipeline.spec.task == "i2v"
    request = resolve(
        pipeline.spec, "a boat", size=(64, 80 if i2v else 96), frame_num=9, sampling_steps=2, shift=5.0,
        seed=6, image=image,
    )  # fmt: skip
    sink = Frames()
    result = pipeline.generate(request, sink)
    assert (result.width, result.height) == ((80, 48) if i2v else (96, 64))
    return sink.video if sink.chunks else np.zeros(0, np.uint8)


def state(pipeline: Pipeline) -> dict[str, Tensor]:
    """Copies of what this rank holds of the experts."""
    experts = {"high": pipeline.high, "low": pipeline.low}
    return {
        f"{expert}.{name}": (p.to_local() if isinstance(p, DTensor) else p.data).clone()
        for expert, model in experts.items()
        if model is not None
        for name, p in model.named_parameters()
    }


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def check_reading(checkpoint: Path, mesh: Mesh) -> dict[str, object]:
    """Both ranks have every tensor, and together they have read each byte once."""
    entries = find_layout(checkpoint).high.entries
    results: dict[str, object] = {}
    for dtype in (torch.float32, torch.bfloat16):
        meter, came = Meter(), list[int]()
        device = torch.device("cpu")
        both = Reader(device, mesh, came.append, meter).tensors(entries, lambda _, dtype=dtype: dtype)
        alone = Reader(device).tensors(entries, lambda _, dtype=dtype: dtype)
        size = sum(entry.size for entry in entries.values())
        results[f"equal {dtype}"] = equal(both, alone)
        results[f"own {dtype}"] = meter.own
        results[f"told {dtype}"] = meter.total == sum(came) == size
        results["size"] = size
    return results


def check_video(checkpoint: Path, mesh: Mesh, rung: str, folder: Path) -> dict[str, object]:
    """The video, the same with a LoRA, and again without; what this rank keeps of the weights."""
    pipeline = load_pipeline(checkpoint, mesh=mesh, device="cpu", rung=rung)  # type: ignore[arg-type]
    before = state(pipeline)
    frames = [video(pipeline), video(pipeline, LORA)]
    changed = not equal(state(pipeline), before)
    frames.append(video(pipeline))
    if mesh.rank == 0:
        np.savez(folder / f"{rung}-{mesh.layout}.npz", *frames)
    matrices = [t for name, t in before.items() if ".ffn.0.weight" in name]
    return {
        "restored": equal(state(pipeline), before),
        "changed": changed,
        "rows": {len(matrix) for matrix in matrices} == {64 if rung == "shard" else 128},
        "again": bool((frames[0] == frames[2]).all()),
    }


def check_reused(checkpoint: Path, mesh: Mesh) -> list[float]:
    """Latents of steps that reuse the guidance, by sharded blocks: a branch then has no pass of its own."""
    pipeline = load_pipeline(checkpoint, mesh=mesh, device="cpu", rung="shard")
    return cached_latents(pipeline).tolist()  # type: ignore[no-any-return]


def check_held(checkpoint: Path, mesh: Mesh) -> bool:
    """8-bit weights alone, quantised as both ranks read them: the video of whole weights, bit for bit."""
    whole = eight_bit_video(load_pipeline(checkpoint, mesh=mesh, device="cpu"))
    pipeline = load_pipeline(checkpoint, mesh=mesh, device="cpu", weights="8bit")
    alone = all(not w.numel() for n, w in pipeline.high.named_parameters() if n.endswith("ffn.0.weight"))
    return alone and np.array_equal(eight_bit_video(pipeline), whole)


def check_verify(checkpoint: Path, mesh: Mesh) -> bool:
    """A file that only one rank hashes is wrong: both say so."""
    try:
        verify(checkpoint, mesh)
    except CheckpointError as error:
        return "has SHA-256" in str(error) and "high_noise_model" in str(error)
    return False


def check_meeting(checkpoint: Path, mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """When the text encoder, which rank 0 alone reads on this rung, was loaded; when loading returned."""
    original, loaded = Loader.text_encoder, [0.0]

    def slow(*arguments: Any, **more: Any) -> PromptEncoder:
        if mesh.rank == 0:
            time.sleep(1.5)
        encoder = original(*arguments, **more)
        loaded[0] = time.monotonic()
        return encoder

    with monkeypatch.context() as patch:
        patch.setattr(Loader, "text_encoder", slow)
        load_pipeline(checkpoint, mesh=mesh, device="cpu", rung="text")
    return [*loaded, time.monotonic()]


def check_stripes(checkpoint: Path, mesh: Mesh) -> list[int]:
    """Bytes that decoding this rank's stripe of larger frames takes: planned, and at the real peak."""
    vae = load_pipeline(checkpoint, mesh=mesh, device="cpu").vae
    frames, rows, columns = 4, 16, 24
    latents = torch.randn(1, vae.config.z_dim, frames, rows, columns)
    with torch.inference_mode(), LiveBytes() as live:
        for _ in vae.decode_chunks(latents, mesh.space(rows, columns)):
            pass
    return [decoding_bytes(vae.config, (frames, *stripe(rows, columns, mesh)), torch.float32), live.peak]


def main(checkpoint: Path, folder: Path, i2v: Path, ti2v: Path, image: Path) -> None:
    torch.set_num_threads(1)
    mesh = Mesh.init(
        guidance=1, ulysses=2, backend="gloo", init_method=f"file://{os.environ['MEETING']}",
        timeout_seconds=60,
    )  # fmt: skip
    results: dict[str, object] = {"reading": check_reading(checkpoint, mesh)}
    for rung in ("resident", "branches", "text", "shard"):
        results[rung] = check_video(checkpoint, mesh, rung, folder)
    for task, model in (("i2v", i2v), ("ti2v", ti2v)):
        frames = photo_video(load_pipeline(model, mesh=mesh, device="cpu"), image)
        if mesh.rank == 0:
            np.save(folder / f"photo-{task}.npy", frames)
    results["meeting"] = check_meeting(checkpoint, mesh, pytest.MonkeyPatch())
    results["stripes"] = check_stripes(checkpoint, mesh)
    results["held"] = check_held(checkpoint, mesh)
    results["verify"] = check_verify(checkpoint, mesh)
    branches = Mesh.init(guidance=2, ulysses=1, timeout_seconds=60)
    results["reused"] = check_reused(checkpoint, branches)
    branches.close()
    (folder / f"results.{mesh.rank}").write_text(json.dumps(results))
    mesh.close()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))

"""One of two gloo ranks: `python -m tests.engine.ranks CHECKPOINT FOLDER`, with RANK and WORLD_SIZE set."""

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.conditioning import Conditioning
from engine.config import Canceled, Progress
from engine.errors import CheckpointError
from engine.load import load_pipeline
from engine.parallel.mesh import Mesh
from engine.pipeline import Pipeline
from engine.requests import resolve
from engine.tracker import Tracker
from tests.engine.sinks import Frames

# Latent grids whose tokens are: 3 x 3 x 5 = 45, odd, so padded; 2 x 2 x 2 = 8, even; 1, fewer than the ranks.
GRIDS = ((3, 6, 10), (2, 4, 4), (1, 2, 2))
CASES = ("frames", "cancel", "split", "heads")


def environment(rank: int, folder: Path) -> dict[str, str]:
    """For a rank's process: a file to meet at, one thread, loopback."""
    return {
        **os.environ,
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "MEETING": str(folder / "meeting"),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }


def case_latents(pipeline: Pipeline, grid: tuple[int, int, int]) -> Tensor:
    """Three steps over both experts, with unequal guidances, from seeded noise and text."""
    request = resolve(pipeline.spec, "-", sampling_steps=3, shift=3.0, guide_scale=(2.0, 3.0), seed=1)
    generator = torch.Generator().manual_seed(4)
    text = torch.randn(2, 512, pipeline.spec.dit.text_dim, generator=generator)
    noise = torch.randn(16, *grid, generator=generator)
    tracker = Tracker(pipeline.mesh, pipeline.device)
    with torch.inference_mode():
        return pipeline.denoise(request, text, noise, Conditioning((0, 0)), tracker)


def check_frames(pipeline: Pipeline) -> bool:
    """Only rank 0 gets frames and progress."""
    sink, seen = Frames(), list[Progress]()
    request = resolve(pipeline.spec, "a cat", frame_num=5, sampling_steps=1, seed=3)
    result = pipeline.generate(request, sink, on_progress=seen.append)
    if pipeline.mesh.rank:
        return not sink.chunks and not seen
    return result.frames == 5 == len(sink.video) and seen[-1] == Progress("decoding", 2, 2)


def check_cancel(pipeline: Pipeline) -> bool:
    """Rank 0's answer stops both, at the same step; what the other rank would say doesn't count."""
    asked = 0

    def should_cancel() -> bool:
        nonlocal asked
        asked += 1
        return pipeline.mesh.rank == 1 or asked > 3

    request = resolve(pipeline.spec, "a cat", frame_num=5, sampling_steps=4, seed=3)
    try:
        pipeline.generate(request, Frames(), should_cancel=should_cancel)
    except Canceled as canceled:
        # encoding 0 and 1, denoising 0, and at denoising 1 the fourth question
        return str(canceled) == "canceled at denoising, step 1 of 4"
    return False


def check_split(pipeline: Pipeline) -> bool:
    """Of 7 tokens in 2 x 4 (one is padding), the first 5 are 4 on rank 0 and 1 on rank 1."""
    sequence = pipeline.sequence
    whole = torch.arange(14.0).view(1, 7, 2)
    part = sequence.shard(whole, 1)
    return (
        sequence.split(5, 7) == (4, 1)[pipeline.mesh.rank]
        and part.shape == (1, 4, 2)
        and torch.equal(sequence.gather(part, 1, 7), whole)
    )


def check_heads(checkpoint: Path, mesh: Mesh) -> bool:
    """Sequence parts that don't divide the heads are refused at loading."""
    try:
        load_pipeline(checkpoint, mesh=Mesh(mesh.rank, 1, 3), device="cpu")
    except CheckpointError as error:
        return "4 heads, which 3 sequence parts don't divide" in str(error)
    return False


def main(checkpoint: Path, folder: Path) -> None:
    for layout in ("2x1", "1x2"):
        guidance, ulysses = map(int, layout.split("x"))
        mesh = Mesh.init(
            guidance=guidance,
            ulysses=ulysses,
            backend="gloo",
            init_method=f"file://{os.environ['MEETING']}",
            timeout_seconds=60,
        )
        assert mesh.layout == layout
        pipeline = load_pipeline(checkpoint, mesh=mesh, device="cpu")
        latents = {"x".join(map(str, grid)): case_latents(pipeline, grid) for grid in GRIDS}
        if mesh.rank == 0:
            save_file(latents, folder / f"{layout}.safetensors")
    checks = {
        "frames": check_frames(pipeline),
        "cancel": check_cancel(pipeline),
        "split": check_split(pipeline),
        "heads": check_heads(checkpoint, mesh),
    }
    for name, right in checks.items():
        (folder / f"{name}.{mesh.rank}").write_text("right" if right else "wrong")
    mesh.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

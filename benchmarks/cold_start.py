"""A node's cold start: from no process to the first video's MP4, with full-size weights read from disk.

    python -m benchmarks.cold_start --gpus 8 --folder DIR [--model A14B] [--json cold.json] [--again]

Writes a random checkpoint in the official layout to `--folder` unless it is there (A14B: 57 GB an expert in
fp32, as published, and 12 GB of the rest; 5B: 34 GB in all), has the page cache forget it, then starts one
process a GPU by torchrun, which does what a node's ranks do: load, warm up, make a video. `--again` does the
last part once more on what is in memory by then. `--tiny` rehearses it on a CPU.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks._disk import cached, drop, filesystem, in_memory
from benchmarks._node_model import picture, prompt_of, rehearsed
from benchmarks._node_parts import video
from benchmarks._random_model import FULL, RandomState, Shape, fill, meta_parts
from benchmarks._sections import write_json
from engine.checkpoint_writer import write_checkpoint
from engine.load import default_device, load_pipeline
from engine.parallel.mesh import Mesh
from engine.requests import resolve
from engine.warmup import warm_up

SHARDS = 12
WHOLE = "whole"  # a file that is there once all others are
CPU = torch.device("cpu")


def write(folder: Path, shape: Shape) -> dict[str, Any]:
    """The checkpoint with random weights; its gigabytes and seconds."""
    began = time.perf_counter()
    _, vae, text = meta_parts(shape)
    device = torch.device("cuda") if torch.cuda.is_available() else CPU
    fill(vae, device, torch.float32)
    fill(text.umt5, device, torch.bfloat16)
    experts = RandomState(shape.dit, device)
    reel = asdict(shape.facts) | {"sizes": ["{}*{}".format(*size) for size in shape.facts.sizes]}
    write_checkpoint(
        folder, dit=shape.dit, task=shape.facts.task, high=experts,
        low=experts if shape.experts > 1 else None, vae=vae.state_dict(),
        vae_kind=shape.vae.kind, umt5=text.umt5.state_dict(), tokenizer=text.tokenizer, reel=reel,
        shards=SHARDS,
    )  # fmt: skip
    size = sum(path.stat().st_size for path in weights(folder)) / 1e9
    (folder / WHOLE).write_text(shape.facts.name)
    return {"gigabytes": size, "seconds": time.perf_counter() - began}


def write_apart(folder: Path, shape: Shape) -> dict[str, Any]:
    """`write` in a process of its own where there are GPUs: the ranks will need what it takes of them."""
    if not torch.cuda.is_available():
        return write(folder, shape)
    with multiprocessing.get_context("spawn").Pool(1) as other:
        return other.apply(write, (folder, shape))


def weights(folder: Path) -> list[Path]:
    """The files that hold tensors."""
    return sorted([*folder.rglob("*.safetensors"), *folder.glob("*.pth")])


def serve_one(folder: Path, started: float, out: Path, steps: int | None) -> None:
    """A rank's part: seconds from `started` (Unix time) to each milestone, written by rank 0."""
    mesh = Mesh.init()
    device = default_device(mesh)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    milestones = {"ranks joined": time.time() - started}
    pipeline = load_pipeline(folder, mesh=mesh, device=device)
    milestones["loaded"] = time.time() - started
    warm_up(pipeline)
    milestones["warm"] = time.time() - started
    more = {"image": picture(pipeline.spec.sizes[0])} if pipeline.spec.task == "i2v" else {}
    request = resolve(pipeline.spec, prompt_of(128), seed=1, sampling_steps=steps, **more)
    made = video(pipeline, request)
    milestones["first video"] = time.time() - started
    if dist.get_rank() == 0:
        card = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
        write_json(out, {"device": card, "seconds_to": milestones, "video": made})
    mesh.close()


def start(folder: Path, gpus: int, steps: int | None, cold: bool) -> dict[str, Any]:
    """One start of a node's ranks; what was in memory before it is part of the result."""
    paths = weights(folder)
    if cold:
        drop(paths)
    share = cached(paths)
    out = folder / "start.json"
    out.unlink(missing_ok=True)
    words = ["--here", str(time.time()), "--folder", str(folder), "--json", str(out)]
    words += [] if steps is None else ["--sampling-steps", str(steps)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}"]
    subprocess.run([*command, "-m", "benchmarks.cold_start", *words], check=True, env=dict(os.environ))
    return {"share_in_page_cache": share, **json.loads(out.read_text())}


def main(given: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument(
        "--folder", type=Path, required=True, help="for the checkpoint; some 130 GB on a disk (5B: 34)"
    )
    parser.add_argument("--model", choices=["A14B", "I2V", "5B"], default="A14B")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--sampling-steps", type=int, help="of the video; the model's default unless given")
    parser.add_argument("--again", action="store_true", help="start once more, on a filled page cache")
    parser.add_argument("--tiny", action="store_true", help="a small model: a rehearsal")
    parser.add_argument("--here", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args(given)
    if arguments.here is not None:
        serve_one(arguments.folder, arguments.here, arguments.json, arguments.sampling_steps)
        return
    if not arguments.tiny and not torch.cuda.is_available():
        sys.exit("benchmarks.cold_start at full size needs CUDA GPUs; torch sees none (--tiny rehearses)")
    folder: Path = arguments.folder
    document: dict[str, Any] = {
        "gpus": arguments.gpus, "torch": torch.__version__,
        "filesystem": filesystem(folder if folder.exists() else folder.parent),
        "in_memory": in_memory(folder if folder.exists() else folder.parent),
    }  # fmt: skip
    shape = rehearsed(arguments.model) if arguments.tiny else FULL[arguments.model]
    document["model"] = shape.facts.name
    if not (folder / WHOLE).exists():
        document["written"] = write_apart(folder, shape)
    elif (there := (folder / WHOLE).read_text()) != shape.facts.name:
        sys.exit(f"{folder} has {there!r}, {shape.facts.name} was asked for: name another folder")
    document["cold"] = start(folder, arguments.gpus, arguments.sampling_steps, cold=True)
    if arguments.again:
        document["again"] = start(folder, arguments.gpus, arguments.sampling_steps, cold=False)
    if arguments.json:
        write_json(arguments.json, document)
    print(json.dumps(document, indent=1), flush=True)


if __name__ == "__main__":
    main()

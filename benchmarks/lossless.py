"""Lossless, shown: videos by the fused path and by the plain bf16 path, each against the plain fp32 path.

    python -m benchmarks.lossless [--model models/demo] [--prompt TEXT ...] [--json FILE]

Without --model a tiny random checkpoint is made. Same prompts, seeds and sizes for all; fp32 products run
without TF32. Ours may be at most 1 dB below plain bf16 (exit code 1 otherwise). On a CPU the fused path runs
through the kernels' references and the VAE stays fp32.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks._parts import psnr
from engine import fused, vae_fused
from engine.load import load_pipeline
from engine.requests import resolve
from engine.tiny import CORPUS, make_tiny
from models.demo.frames import Frames

ALLOWED_DB = 1.0
# name -> (dtype of the products, whether blocks and VAE run fused)
PATHS = {
    "plain fp32": (torch.float32, False),
    "plain bf16": (torch.bfloat16, False),
    "fused bf16 (ours)": (torch.bfloat16, True),
}
EXACT, PLAIN, OURS = PATHS


@contextmanager
def path(is_fused: bool) -> Iterator[None]:
    """Blocks and VAE fused, or as the maths reads, whatever the device."""
    with (
        mock.patch.object(fused, "applies", return_value=is_fused),
        mock.patch.object(vae_fused, "applies", return_value=is_fused),
    ):
        yield


def videos(
    model: Path, name: str, prompts: list[str], frame_num: int | None, device: torch.device
) -> list[list[Tensor]]:
    """One video a prompt, prompt i with seed i."""
    dtype, is_fused = PATHS[name]
    made = []
    with path(is_fused):
        pipeline = load_pipeline(model, device=device, dtype=dtype)
        for seed, prompt in enumerate(prompts):
            sink = Frames()
            pipeline.generate(resolve(pipeline.spec, prompt, frame_num=frame_num, seed=seed), sink)
            made.append([torch.from_numpy(part.copy()) for part in sink.parts])
            print(f"  {name}: {seed + 1} of {len(prompts)}", file=sys.stderr, flush=True)
    return made


def compare(model: Path, prompts: list[str], frame_num: int | None, device: torch.device) -> dict[str, Any]:
    """PSNR of each half-precision path to plain fp32: all, and their mean."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    exact = videos(model, EXACT, prompts, frame_num, device)
    found: dict[str, Any] = {}
    for name in (PLAIN, OURS):
        decibels = [
            psnr(got, want)
            for got, want in zip(videos(model, name, prompts, frame_num, device), exact, strict=True)
        ]
        found[name] = {"psnr_db": decibels, "mean_db": statistics.fmean(decibels)}
    found["difference_db"] = found[OURS]["mean_db"] - found[PLAIN]["mean_db"]
    # Both infinite (all levels equal) is no difference, and NaN is never good enough.
    if found[OURS]["mean_db"] == found[PLAIN]["mean_db"]:
        found["difference_db"] = 0.0
    found["good"] = found["difference_db"] >= -ALLOWED_DB
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, help="checkpoint folder; a tiny one is made if none is given")
    parser.add_argument("--prompt", nargs="+", default=list(CORPUS[:4]), help="one video each")
    parser.add_argument("--frame-num", type=int, help="the model's default if not given")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or make_tiny(Path(folder) / "tiny")
        found = compare(model, arguments.prompt, arguments.frame_num, device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
    print(f"PSNR of 8-bit levels to plain fp32, {len(arguments.prompt)} videos on {where}:")
    for name in (PLAIN, OURS):
        print(f"  {name}: {found[name]['mean_db']:.2f} dB")
    if arguments.json:
        arguments.json.write_text(json.dumps({"device": where, "model": str(model)} | found, indent=1))
    if not found["good"]:
        sys.exit(f"ours is more than {ALLOWED_DB} dB below plain bf16: {found['difference_db']:.2f} dB")


if __name__ == "__main__":
    main()

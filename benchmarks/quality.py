"""How well a model of the synthetic world follows its prompts: `reel bench quality`.

    python -m benchmarks.quality [--model models/demo] [--count 512] [--out quality.json]

Every held-out caption is generated once, caption i with seed i, by the engine's own pipeline; nothing is
picked. A classifier that saw only drawn clips reads colour, shape and motion off the frames. It is itself
measured on the same scenes, drawn and sent through the VAE. Results are appended to a file beside --out,
so that a run that was cut off goes on where it ended.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.config import FrameSink
from engine.load import load_pipeline
from engine.pipeline import Pipeline
from engine.requests import resolve
from models.demo.train.captions import held_out_prompts
from models.demo.train.classifier import Classifier, load_classifier
from models.demo.train.common import MODEL_DIR, psnr
from models.demo.train.judge import Tally, add, judge
from models.demo.train.render import pack, render
from models.demo.train.world import Scene


class Frames(FrameSink):
    """Keeps a video's frames in memory."""

    def __init__(self) -> None:
        self.parts: list[np.ndarray] = []

    def write(self, frames: np.ndarray) -> None:
        """Take [T, H, W, 3] uint8."""
        self.parts.append(frames)

    def video(self) -> Tensor:
        """[1, 3, T, H, W] in [-1, 1]."""
        frames = torch.from_numpy(np.concatenate(self.parts))
        return frames.permute(3, 0, 1, 2)[None].float() / 127.5 - 1


def generate(pipeline: Pipeline, prompt: str, seed: int, size: tuple[int, int], frame_num: int) -> Tensor:
    """One clip [1, 3, T, H, W] with the model's defaults otherwise."""
    request = resolve(pipeline.spec, prompt, size=size, frame_num=frame_num, seed=seed)
    sink = Frames()
    pipeline.generate(request, sink)
    return sink.video()


@torch.inference_mode()
def round_trip(pipeline: Pipeline, scene: Scene, frame_num: int, side: int) -> tuple[Tensor, float]:
    """(the drawn clip after the VAE, its PSNR in dB)."""
    video = render(pack([scene]), frame_num, side, side)
    weights = next(pipeline.vae.parameters())
    latents = pipeline.vae.encode(video.to(weights.device, weights.dtype))
    again = pipeline.vae.decode(latents).float().clamp(-1, 1).cpu()
    return again, float(psnr(again, video))


def measure(
    pipeline: Pipeline,
    classifier: Classifier,
    pairs: list[tuple[Scene, str]],
    log: Path,
    *,
    frame_num: int = 17,
    side: int = 128,
) -> list[dict[str, object]]:
    """One row a caption, the rows that `log` holds already first; new ones are appended to it."""
    lines = log.read_text().splitlines() if log.exists() else []
    rows: list[dict[str, object]] = [json.loads(line) for line in lines[: len(pairs)]]
    with log.open("a") as file:
        for index in range(len(rows), len(pairs)):
            scene, prompt = pairs[index]
            clip = generate(pipeline, prompt, index, (side, side), frame_num)
            drawn, decibels = round_trip(pipeline, scene, frame_num, side)
            rows.append(
                {
                    "seed": index,
                    "prompt": prompt,
                    "generated": judge(classifier, clip, [scene]),
                    "drawn": judge(classifier, drawn, [scene]),
                    "vae_psnr_db": round(decibels, 3),
                }
            )
            print(json.dumps(rows[-1]), file=file, flush=True)
            if index % 16 == 15:
                print(f"{index + 1} of {len(pairs)}", summary(rows)["generated"], flush=True)
    return rows


def summary(rows: list[dict[str, object]]) -> dict[str, object]:
    """Shares of right answers with the number of questions, and the mean PSNR."""

    def rates(tallies: Iterable[Tally]) -> dict[str, str]:
        return {
            name: f"{right}/{asked} = {right / asked:.1%}"
            for name, (right, asked) in add(tallies).items()
            if asked
        }

    return {
        "captions": len(rows),
        "generated": rates(row["generated"] for row in rows),  # type: ignore[misc]
        "drawn_after_vae": rates(row["drawn"] for row in rows),  # type: ignore[misc]
        "vae_psnr_db": round(float(np.mean([row["vae_psnr_db"] for row in rows])), 2),  # type: ignore[misc]
    }


def main() -> None:
    """Load, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    parser.add_argument("--judge", type=Path, default=MODEL_DIR, help="folder with classifier.safetensors")
    parser.add_argument("--count", type=int, default=512, help="held-out captions, from the first on")
    parser.add_argument("--frame-num", type=int, default=17)
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path("out/quality.json"))
    args = parser.parse_args()
    pairs = [(scene, caption.text) for scene, caption in held_out_prompts(args.count)]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    rows = measure(
        load_pipeline(args.model),
        load_classifier(args.judge),
        pairs,
        args.out.with_suffix(".jsonl"),
        frame_num=args.frame_num,
        side=args.side,
    )
    result = summary(rows)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

"""How well a model of the synthetic world follows its prompts: `reel bench quality`.

    python -m benchmarks.quality [--model models/demo] [--count 512] [--processes 2] [--out quality.json]

Every held-out caption is generated once, caption i with seed i, by the engine's own pipeline; nothing is
picked. A classifier that saw only drawn clips reads colour, shape and motion off the frames. It is itself
measured on the same scenes, drawn and sent through the VAE. Results are appended to a file beside --out,
so that a run that was cut off goes on where it ended. With `--presets all` it compares the model's quality
presets with lossless instead; see `benchmarks.presets`, whose arguments it then takes.
"""

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.load import load_pipeline
from engine.pipeline import Pipeline
from engine.requests import resolve
from models.demo.frames import Frames
from models.demo.train.captions import held_out_prompts, known_prompts
from models.demo.train.classifier import Classifier, load_classifier
from models.demo.train.common import MODEL_DIR, psnr
from models.demo.train.judge import Tally, add, judge
from models.demo.train.render import pack, render
from models.demo.train.world import Scene

Row = dict[str, Any]  # a caption's seed, prompt, tallies and decibels


def generate(
    pipeline: Pipeline, prompt: str, seed: int, size: tuple[int, int], frame_num: int, **asked: Any
) -> Tensor:
    """One clip [1, 3, T, H, W] with what is asked, and the model's defaults otherwise."""
    request = resolve(pipeline.spec, prompt, size=size, frame_num=frame_num, seed=seed, **asked)
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


@dataclass(frozen=True)
class Setting:
    """What every caption is made with."""

    model: Path
    judge: Path
    frame_num: int
    side: int
    threads: int
    asked: str = "{}"  # JSON: request fields other than the model's defaults


class Worker:
    """One process's pipeline and judge, loaded at its first caption."""

    loaded: tuple[Pipeline, Classifier] | None = None

    @classmethod
    def row(cls, task: tuple[Setting, int, Scene, str]) -> Row:
        """Generate and judge caption `index`, with its index as the seed."""
        setting, index, scene, prompt = task
        if cls.loaded is None:
            torch.set_num_threads(setting.threads)
            cls.loaded = load_pipeline(setting.model), load_classifier(setting.judge)
        pipeline, classifier = cls.loaded
        asked = json.loads(setting.asked)
        clip = generate(pipeline, prompt, index, (setting.side, setting.side), setting.frame_num, **asked)
        drawn, decibels = round_trip(pipeline, scene, setting.frame_num, setting.side)
        return {
            "seed": index,
            "prompt": prompt,
            "asked": asked,
            "generated": judge(classifier, clip, [scene]),
            "drawn": judge(classifier, drawn, [scene]),
            "vae_psnr_db": round(decibels, 3),
        }


def measure(pairs: list[tuple[Scene, str]], log: Path, setting: Setting, processes: int) -> list[Row]:
    """One row a caption in order of seeds; rows of the same captions and setting in `log` are kept."""
    asked, rows = json.loads(setting.asked), dict[int, Row]()
    for row in map(json.loads, log.read_text().splitlines() if log.exists() else []):
        seed = row["seed"]
        if seed < len(pairs) and (row["prompt"], row.get("asked", {})) == (pairs[seed][1], asked):
            rows[seed] = row
    todo = [(setting, i, *pair) for i, pair in enumerate(pairs) if i not in rows]
    with ExitStack() as stack:
        file = stack.enter_context(log.open("a"))
        made: Iterable[Row]
        if processes > 1:
            pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(processes))
            made = pool.imap_unordered(Worker.row, todo)
        else:
            made = map(Worker.row, todo)
        for row in made:
            rows[row["seed"]] = row
            print(json.dumps(row), file=file, flush=True)
            if len(rows) % 16 == 0:
                print(f"{len(rows)} of {len(pairs)}", summary(list(rows.values()))["generated"], flush=True)
    return [rows[index] for index in range(len(pairs))]


def summary(rows: list[Row]) -> dict[str, Any]:
    """Shares of right answers with the number of questions, and the mean PSNR."""

    def rates(tallies: Iterable[Tally]) -> dict[str, str]:
        return {
            name: f"{right}/{asked} = {right / asked:.1%}"
            for name, (right, asked) in add(tallies).items()
            if asked
        }

    return {
        "captions": len(rows),
        "generated": rates(row["generated"] for row in rows),
        "drawn_after_vae": rates(row["drawn"] for row in rows),
        "vae_psnr_db": round(float(np.mean([row["vae_psnr_db"] for row in rows])), 2),
    }


def main() -> None:
    """Load, measure, print; with --presets what each preset loses (`benchmarks.presets`)."""
    if any(argument.startswith("--presets") for argument in sys.argv[1:]):
        from benchmarks.presets import main as compare_presets

        compare_presets()
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    parser.add_argument("--judge", type=Path, default=MODEL_DIR, help="folder with classifier.safetensors")
    parser.add_argument("--count", type=int, default=512, help="held-out captions, from the first on")
    parser.add_argument("--frame-num", type=int, default=17)
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--processes", type=int, default=1, help="captions made at once, each on its share")
    parser.add_argument("--known", action="store_true", help="captions of training's kind, to choose by")
    parser.add_argument("--asked", default="{}", help='JSON of request fields: {"sampling_steps": 40, ...}')
    parser.add_argument("--out", type=Path, default=Path("out/quality.json"))
    args = parser.parse_args()
    prompts = known_prompts(args.count) if args.known else held_out_prompts(args.count)
    pairs = [(scene, caption.text) for scene, caption in prompts]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    setting = Setting(
        args.model, args.judge, args.frame_num, args.side,
        max(1, (os.cpu_count() or 1) // args.processes), args.asked,
    )  # fmt: skip
    rows = measure(pairs, args.out.with_suffix(".jsonl"), setting, args.processes)
    result = summary(rows)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

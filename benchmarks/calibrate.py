"""Finds a model's settings for `8bit`, `8bit-cache` and `4bit`: the boldest that keep their quality floor.

    python -m benchmarks.calibrate [--model models/demo] [--count 16] [--only 4bit] [--out FILE]

On captions of training's kind, none of which the presets' table is measured on, each ladder is walked from
the boldest setting down; the first that keeps both floors is taken: mean PSNR to the lossless clips with
`MARGIN_DB` to spare, and clips that the judge reads right, within `FLOOR_POINTS` of the lossless ones.
`8bit-cache` is calibrated on top of what `8bit` got. Prints the `presets` object for the model's reel.json;
a preset that no rung can keep is left out, and so is never offered.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks._similarity import psnr_db
from benchmarks.presets import FLOOR_DB, FLOOR_POINTS, Maker, Setting
from engine.config import Work
from engine.presets import CACHED, EIGHT_BIT, FOUR_BIT, LOSSLESS
from models.demo.train.captions import describe
from models.demo.train.common import MODEL_DIR
from models.demo.train.judge import judge
from models.demo.train.world import sample_scenes

MARGIN_DB = 1.0
SEED = 7_000  # of scenes and of clips; the table's seeds are 0 and up
Parts = dict[str, Any]

# Which blocks and first steps stay lossless, the fewest first.
EIGHTS: tuple[Parts, ...] = (
    {"keep_blocks": [], "first_steps": 0},
    {"keep_blocks": [0, -1], "first_steps": 0},
    {"keep_blocks": [0, -1], "first_steps": 2},
    {"keep_blocks": [0, -1], "first_steps": 5},
    {"keep_blocks": [0, 1, -2, -1], "first_steps": 2},
    {"keep_blocks": [0, 1, -2, -1], "first_steps": 5},
)
# The most arithmetic saved first, at A14B's proportions (`benchmarks.reuse`).
REUSES: tuple[Parts, ...] = (
    {"step_threshold": 0.4, "guidance_threshold": 0.5, "max_reuse": 3, "first": 2, "last": 1},
    {"step_threshold": 0.25, "guidance_threshold": 0.4, "max_reuse": 2, "first": 2, "last": 1},
    {"step_threshold": 0.12, "attention_threshold": 0.3, "guidance_threshold": 0.4, "max_reuse": 3},
    {"step_threshold": 0.0, "attention_threshold": 0.3, "guidance_threshold": 0.4, "max_reuse": 1},
    {"step_threshold": 0.15, "guidance_threshold": 0.4, "max_reuse": 1, "first": 3, "last": 1},
    {"step_threshold": 0.12, "guidance_threshold": 0.0, "max_reuse": 1, "first": 4, "last": 2},
    {"step_threshold": 0.1, "guidance_threshold": 0.0, "max_reuse": 1, "first": 5, "last": 3},
    {"step_threshold": 0.0, "guidance_threshold": 0.35, "max_reuse": 1, "first": 3, "last": 1},
)


class Trial:
    """The captions, with their lossless clips made once."""

    def __init__(self, maker: Maker, count: int) -> None:
        self.maker = maker
        rng = random.Random(SEED)
        scenes = sample_scenes(count, SEED, "train")
        self.prompts = [(SEED + i, describe(scene, rng).text) for i, scene in enumerate(scenes)]
        self.scenes = scenes
        self.targets: list[Tensor] = [maker.clip(LOSSLESS, prompt, seed)[0] for seed, prompt in self.prompts]
        self.lossless_right = self.read_right(self.targets)

    def read_right(self, clips: list[Tensor]) -> int:
        """How many clips the judge reads as their captions say; 0 where there is no judge."""
        if self.maker.judge is None:
            return 0
        pairs = zip(clips, self.scenes, strict=True)
        return sum(judge(self.maker.judge, clip[None], [scene])["all"][0] for clip, scene in pairs)

    def clips(self, name: str, told: Parts) -> list[tuple[Tensor, float, Work]]:
        """Each caption's (clip, PSNR under these settings, what was done)."""
        self.maker.offer(told)
        found = []
        for (seed, prompt), target in zip(self.prompts, self.targets, strict=True):
            clip, work, _ = self.maker.clip(name, prompt, seed)
            found.append((clip, psnr_db(clip, target), work))
        return found

    def losses(self, name: str, told: Parts) -> tuple[float, float, float]:
        """(mean PSNR under these settings, points of clips read right that are lost, share of steps run)."""
        clips = self.clips(name, told)
        computed = sum(work.steps_computed for *_, work in clips)
        steps = computed + sum(work.steps_reused for *_, work in clips)
        right = self.read_right([clip for clip, *_ in clips])
        points = 100 * (self.lossless_right - right) / len(clips)
        return float(np.mean([decibels for _, decibels, _ in clips])), points, computed / steps

    def first(self, name: str, rungs: list[Parts]) -> Parts | None:
        """The first of the settings that keeps the floors."""
        for rung in rungs:
            decibels, points, computed = self.losses(name, {name: rung})
            print(
                f"{name} {json.dumps(rung)}: {decibels:.2f} dB, {points:.1f} points fewer read right, "
                f"{computed:.0%} of the steps", flush=True,
            )  # fmt: skip
            if decibels >= FLOOR_DB[name] + MARGIN_DB and points <= FLOOR_POINTS:
                return rung
        print(
            f"{name}: no setting keeps {FLOOR_DB[name] + MARGIN_DB} dB and loses at most {FLOOR_POINTS} "
            "points", flush=True,
        )  # fmt: skip
        return None


def calibrate(trial: Trial, only: str = "") -> Parts:
    """The `presets` object; with `only` of one number format: 8bit's also gives 8bit-cache, built on it."""
    told: Parts = {}
    if only != FOUR_BIT and (eight := trial.first(EIGHT_BIT, list(EIGHTS))) is not None:
        told[EIGHT_BIT] = eight
        cached = trial.first(CACHED, [eight | reuse for reuse in REUSES])
        told |= {} if cached is None else {CACHED: cached}
    if only != EIGHT_BIT and (four := trial.first(FOUR_BIT, list(EIGHTS))) is not None:
        told[FOUR_BIT] = four
    return told


def arguments(description: str, count: int, out: str) -> argparse.ArgumentParser:
    """The flags of every command that compares clips with the lossless ones of a `Trial`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    parser.add_argument("--judge", type=Path, default=MODEL_DIR, help="folder with classifier.safetensors")
    parser.add_argument("--count", type=int, default=count, help="captions of training's kind")
    parser.add_argument("--frame-num", type=int, default=17)
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path(out))
    return parser


def device_flag(parser: argparse.ArgumentParser) -> None:
    """For commands that run on a GPU too."""
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def trial_of(args: argparse.Namespace, device: str) -> Trial:
    """The captions that the flags ask for, with their lossless clips."""
    threads = torch.get_num_threads()
    setting = Setting(args.model, args.judge, (), "", args.frame_num, args.side, threads, device)
    return Trial(Maker(setting), args.count)


def main(argv: list[str] | None = None) -> None:
    """Walk the ladders and print what was found."""
    parser = arguments(__doc__ or "", 16, "out/calibrated.json")
    parser.add_argument("--only", choices=[EIGHT_BIT, FOUR_BIT], default="", help="8bit: and 8bit-cache")
    device_flag(parser)
    args = parser.parse_args(argv)
    told = calibrate(trial_of(args, args.device), args.only)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(told) + "\n")
    print(json.dumps({"presets": told}, indent=2))


if __name__ == "__main__":
    main()

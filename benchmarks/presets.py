"""What each quality preset loses on the demo model: `reel bench quality --presets all`.

    python -m benchmarks.presets [--model models/demo] [--count 256] [--processes 2] [--out out/presets.json]

Held-out caption i is made with seed i under every preset, and its clip compared with the lossless one of the
same seed: PSNR, SSIM, a distance in the judge's features; beside them the same figures between two lossless
runs, in bf16 and in fp32. The judge also reads whether each clip shows what the caption says. The five
worst clips of each preset (by PSNR) become a contact sheet beside --out, lossless above, preset below.

A preset may be offered if its PSNR keeps the floor and its share of clips read right is within 2 points of
lossless. On a CPU 8 bits are emulated, exactly but for the order of sums, so its seconds say nothing. So are
4 bits (NVFP4), and on every GPU before Blackwell; Blackwell's own path was never run. Rows are appended to a
file beside --out: a run that was cut off goes on.
"""

import argparse
import json
import multiprocessing
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks._similarity import feature_distance, psnr_db, ssim
from engine.config import Work
from engine.load import capability, load_pipeline
from engine.pipeline import Pipeline
from engine.presets import CACHED, EIGHT_BIT, FOUR_BIT, LOSSLESS, PARTS, Machine, offers
from engine.requests import resolve
from models.demo.frames import Frames
from models.demo.train.captions import held_out_prompts
from models.demo.train.classifier import Classifier, load_classifier
from models.demo.train.common import MODEL_DIR
from models.demo.train.judge import add, judge
from models.demo.train.world import Scene

OTHER = "lossless in fp32"  # beside bf16: what rounding alone does
FLOOR_DB = {EIGHT_BIT: 30.0, CACHED: 25.0, FOUR_BIT: 25.0}
FLOOR_POINTS = 2.0  # of clips that the judge reads right
WORST = 5
Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """What every clip is made with."""

    model: Path
    judge: Path | None  # None: clips are compared, not read
    names: tuple[str, ...]  # presets, lossless not among them
    told: str  # JSON of the `presets` object; "": reel.json's
    frame_num: int
    side: int
    threads: int
    device: str


class Maker:
    """One process's pipelines and judge, loaded at its first clip."""

    made: "Maker | None" = None

    def __init__(self, setting: Setting) -> None:
        torch.set_num_threads(setting.threads)
        self.setting = setting
        self.pipelines: dict[str, Pipeline] = {}
        self.device = torch.device(setting.device)
        for name, dtype in ((LOSSLESS, torch.bfloat16), (OTHER, torch.float32)):
            self.pipelines[name] = load_pipeline(setting.model, device=self.device, dtype=dtype)
        if setting.told:
            self.offer(json.loads(setting.told))
        self.judge: Classifier | None = None if setting.judge is None else load_classifier(setting.judge)

    def offer(self, told: Row) -> None:
        """Have these presets instead of reel.json's."""
        pipeline = self.pipelines[LOSSLESS]
        machine = Machine(capability(self.device), pipeline.spec.loras, emulate=True)
        pipeline.spec = replace(pipeline.spec, presets=offers(told, machine))

    @classmethod
    def of(cls, setting: Setting) -> "Maker":
        """This process's own."""
        if cls.made is None:
            cls.made = cls(setting)
        return cls.made

    def clip(self, name: str, prompt: str, seed: int) -> tuple[Tensor, Work, float]:
        """(clip [3, T, H, W] in [-1, 1], what was done, seconds of denoising) under a preset or `OTHER`."""
        pipeline = self.pipelines[OTHER if name == OTHER else LOSSLESS]
        size = (self.setting.side, self.setting.side)
        request = resolve(
            pipeline.spec,
            prompt,
            size=size,
            frame_num=self.setting.frame_num,
            seed=seed,
            quality=LOSSLESS if name == OTHER else name,
        )
        sink = Frames()
        result = pipeline.generate(request, sink)
        return sink.video()[0], result.work, result.seconds["denoising"]

    def row(self, index: int, scene: Scene, prompt: str) -> Row:
        """All presets of one caption against its lossless clip."""
        found: Row = {"seed": index, "prompt": prompt, "told": self.setting.told, "presets": {}}
        assert self.judge is not None
        target = Tensor()
        for name in (LOSSLESS, OTHER, *self.setting.names):
            clip, work, seconds = self.clip(name, prompt, index)
            target = clip if name == LOSSLESS else target
            found["presets"][name] = {
                "psnr_db": round(psnr_db(clip, target), 3),
                "ssim": round(ssim(clip, target), 5),
                "features": round(feature_distance(self.judge, clip, target), 5),
                "tally": judge(self.judge, clip[None], [scene]),
                "work": asdict(work),
                "denoising_seconds": round(seconds, 3),
            }
        return found


def _row(task: tuple[Setting, int, Scene, str]) -> Row:
    setting, index, scene, prompt = task
    return Maker.of(setting).row(index, scene, prompt)


def measure(pairs: list[tuple[Scene, str]], log: Path, setting: Setting, processes: int) -> list[Row]:
    """One row a caption; rows of the same presets and settings that `log` holds are kept, new ones added."""
    rows: dict[int, Row] = {}
    for row in map(json.loads, log.read_text().splitlines() if log.exists() else []):
        if set(setting.names) <= set(row["presets"]) and row["told"] == setting.told:
            rows[row["seed"]] = row
    todo = [(setting, i, *pair) for i, pair in enumerate(pairs) if i not in rows]
    with ExitStack() as stack:
        file = stack.enter_context(log.open("a"))
        made: Iterable[Row] = map(_row, todo)
        if processes > 1:
            pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(processes))
            made = pool.imap_unordered(_row, todo)
        for row in made:
            rows[row["seed"]] = row
            print(json.dumps(row), file=file, flush=True)
            if len(rows) % 8 == 0:
                print(f"{len(rows)} of {len(pairs)}", flush=True)
    return [rows[index] for index in range(len(pairs))]


def summary(rows: list[Row], names: tuple[str, ...]) -> Row:
    """Each preset's means, its worst clip, what it left out, and whether it may be offered."""
    found: Row = {}
    for name in (LOSSLESS, OTHER, *names):
        each = [row["presets"][name] for row in rows]
        tally = add({k: tuple(v) for k, v in one["tally"].items()} for one in each)  # type: ignore[misc]
        right, asked = tally["all"]
        decibels = [one["psnr_db"] for one in each]
        computed = sum(one["work"]["steps_computed"] for one in each)
        reused = sum(one["work"]["steps_reused"] for one in each)
        attention = sum(one["work"].get("attention_reused", 0) for one in each)  # older rows have none
        found[name] = {
            "psnr_db": round(float(np.mean(decibels)), 2),
            "psnr_db_worst": round(min(decibels), 2),
            "ssim": round(float(np.mean([one["ssim"] for one in each])), 4),
            "features": round(float(np.mean([one["features"] for one in each])), 4),
            "read right": f"{right}/{asked} = {right / asked:.1%}",
            "points": round(100 * right / asked, 2),
            "steps reused": f"{reused / (computed + reused):.1%}",
            "guidance reused": f"{sum(one['work']['guidance_reused'] for one in each) / computed:.1%}",
            "attention reused": f"{attention / computed:.1%}",
        }
        floor = FLOOR_DB.get(name)
        lost = found[LOSSLESS]["points"] - found[name]["points"]
        if name in names:
            keeps = (floor is None or found[name]["psnr_db"] >= floor) and lost <= FLOOR_POINTS
            found[name]["may be offered"] = keeps
    return found


def sheet(maker: Maker, rows: list[Row], name: str, path: Path) -> None:
    """The worst clips of a preset: for each two lines of frames, lossless above."""
    worst = sorted(rows, key=lambda row: float(row["presets"][name]["psnr_db"]))[:WORST]
    lines = []
    for row in worst:
        for each in (LOSSLESS, name):
            clip = maker.clip(each, row["prompt"], row["seed"])[0]
            picks = torch.linspace(0, clip.shape[1] - 1, 6).round().long()
            frames = ((clip[:, picks] + 1) * 127.5).round().byte().permute(1, 2, 3, 0)
            lines.append(torch.cat(list(frames), dim=1))
    Image.fromarray(torch.cat(lines).numpy()).save(path)


def table(result: Row) -> str:
    """The summary as Markdown."""
    columns = [
        "psnr_db",
        "psnr_db_worst",
        "ssim",
        "features",
        "read right",
        "steps reused",
        "guidance reused",
    ]
    lines = ["| preset | " + " | ".join(columns) + " | may be offered |", "|---" * (len(columns) + 2) + "|"]
    for name, one in result.items():
        offered = {True: "yes", False: "no"}.get(one.get("may be offered"), "")  # type: ignore[arg-type]
        lines.append("| " + " | ".join([name, *(str(one[c]) for c in columns), offered]) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Make, compare, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--presets", default="all", help="names by comma; all: those that the model offers")
    parser.add_argument("--told", default="", help="JSON to use instead of the presets in reel.json")
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    parser.add_argument("--judge", type=Path, default=MODEL_DIR, help="folder with classifier.safetensors")
    parser.add_argument("--count", type=int, default=256, help="held-out captions, from the first on")
    parser.add_argument("--frame-num", type=int, default=17)
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("out/presets.json"))
    args = parser.parse_args(argv)
    told = (
        json.loads(args.told)
        if args.told
        else json.loads((args.model / "reel.json").read_text()).get("presets", {})
    )
    names = tuple(told) if args.presets == "all" else tuple(args.presets.split(","))
    if not names or set(names) - set(PARTS) or set(names) - set(told):
        parser.error(
            f"presets {', '.join(names) or 'none'}: {args.model}/reel.json has {', '.join(told) or 'none'}"
        )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    threads = max(1, torch.get_num_threads() // args.processes)
    setting = Setting(
        args.model, args.judge, names, json.dumps(told), args.frame_num, args.side, threads, args.device
    )
    pairs = [(scene, caption.text) for scene, caption in held_out_prompts(args.count)]
    rows = measure(pairs, args.out.with_suffix(".jsonl"), setting, args.processes)
    result = summary(rows, names)
    args.out.write_text(json.dumps({"captions": len(rows), "told": told, "presets": result}, indent=1) + "\n")
    maker = Maker.of(setting)
    for name in names:
        sheet(maker, rows, name, args.out.with_name(f"{args.out.stem}-worst-{name}.png"))
    print(table(result))


if __name__ == "__main__":
    main()

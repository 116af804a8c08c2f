"""Whole videos on a node: every layout's steps and videos, the official computation, parity with one GPU.

    python -m benchmarks.node --gpus 8 --json node.json [--resume] [--budget 550] [--layouts 2x4 1x8]

It starts one process a GPU by torchrun (or takes the ranks that torchrun gave it). Every rank makes the full
model with random weights on its device. In this order, each part written down as soon as it exists:

parity     a short video's latents on one GPU and on each layout; a layout that is off ends the run
official   sustained steps of the official computation (Ulysses over NCCL) by each attention
steps      sustained steps of both experts in each layout, and with the transfers off
videos     `--videos` whole videos in each layout with their MP4, after the warm-up of a served node

A part begins only if it should end within `--budget`; `--resume` skips what the file has, so a run on a
machine that is lent for minutes can be continued. `--quality 8bit` with `--told JSON` (as in a reel.json)
makes steps and videos by a preset. `--device cpu` rehearses everything on tiny models over gloo.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import _node_parts as parts
from benchmarks._book import Book, check_place
from benchmarks._expected import OFFICIAL, step_seconds, sustained_seconds, warm_up_seconds
from benchmarks._node_model import TIMEOUT_SECONDS, Node
from benchmarks._ranks import join_ranks, start_ranks, started
from engine.config import GenerationRequest
from engine.presets import LOSSLESS
from engine.specs import parse_size
from engine.warmup import warm_up


class Run:
    """One invocation on this rank."""

    def __init__(self, arguments: argparse.Namespace, book: Book) -> None:
        self.arguments, self.book = arguments, book
        tiny = arguments.device == "cpu"
        self.device = join_ranks(arguments.device, TIMEOUT_SECONDS)
        world = dist.get_world_size()
        self.layouts: list[str] = arguments.layouts or default_layouts(world)
        for layout in self.layouts:
            if math.prod(map(int, layout.split("x"))) != world:
                raise ValueError(f"layout {layout} is not of {world} ranks, which there are")
        self.warm: set[str] = set()  # layouts that this process has warmed
        self.node = Node(arguments.model, self.device, json.loads(arguments.told or "{}"), tiny)
        spec = self.node.spec
        self.size = spec.sizes[0] if arguments.size is None else parse_size(arguments.size)
        steps = arguments.sampling_steps or spec.sampling_steps
        self.request(steps, 0)  # refused now, not after minutes
        card = "CPU" if tiny else torch.cuda.get_device_name()
        book.begin(
            device=card, torch=torch.__version__, gpus=world, model=spec.name, quality=arguments.quality,
            size=list(self.size), frame_num=arguments.frame_num or spec.frame_num, sampling_steps=steps,
        )  # fmt: skip
        began = time.perf_counter()
        self.node.make()
        book.write(memory=self.node.memory, made_in_seconds=time.perf_counter() - began)

    def request(self, steps: int, number: int) -> GenerationRequest:
        """Of a video."""
        more = {"frame_num": self.arguments.frame_num, "quality": self.arguments.quality}
        return self.node.request(self.size, steps, number, **more)

    def part(self, name: str, seconds: float, work: Callable[[], Any]) -> None:
        """One part, unless the file has it or its time would be too short."""
        if name in self.book.data:
            return
        if not self.book.left(seconds, self.device):
            self.book.postpone(name)
            return
        began = time.perf_counter()
        self.book.write(**{name: work()})
        self.book.say(f"{name} ({time.perf_counter() - began:.0f} s): {json.dumps(self.book.data[name])}")

    def all(self) -> None:
        """Every part that is asked for."""
        arguments, node = self.arguments, self.node
        short = min(node.spec.sizes, key=lambda size: size[0] * size[1])
        stride = node.spec.vae.stride[0]
        for layout in self.layouts if "parity" in arguments.parts and node.world > 1 else ():
            self.part(f"parity {layout}", 45, lambda: parts.parity(node, layout, 4, 2 * stride + 1, short))  # noqa: B023
        steps = parts.Steps(node, self.size, arguments.frame_num)
        seconds = arguments.seconds
        tokens = math.prod(steps.grid(node.pipeline.high))
        once = step_seconds(node.shape.dit, tokens, node.world)  # expected, on all ranks
        with torch.inference_mode():
            if "official" in arguments.parts:
                takes = sum(
                    once + sustained_seconds(times * once, seconds, profiled=False)
                    for times in OFFICIAL.values()
                )
                self.part("official", 10 + takes, lambda: parts.time_official(node, steps, seconds))
            for layout in self.layouts if "steps" in arguments.parts else ():
                work = lambda: parts.time_steps(node, steps, layout, seconds, arguments.quality)  # noqa: E731, B023
                takes = sustained_seconds(once, seconds) + sustained_seconds(
                    once, seconds / 2, profiled=False
                )
                self.part(f"steps {layout}", 10 + len(steps.experts()) * takes, work)
        for layout in self.layouts if "videos" in arguments.parts else ():
            self.videos(layout)
        if dist.get_rank() == 0:
            print(table(self.book.data), flush=True)
        node.close()
        dist.destroy_process_group()

    def videos(self, layout: str) -> None:
        """The process' warm-up of the layout, and one video after another: none is made cold."""
        names = [f"video {layout} {number}" for number in range(self.arguments.videos)]
        for number, name in enumerate(names):
            if name in self.book.data:
                continue
            guess = self.guess(layout)
            if layout not in self.warm:
                expected = warm_up_seconds(self.node.pipeline, self.node.shape.dit, self.node.world)
                if not self.book.left(expected + guess, self.device):
                    self.book.postpone(name)
                    continue
                self._warm(layout)
            request = self.request(self.book.data["sampling_steps"], number)
            self.part(name, guess, lambda: parts.video(self.node.on(layout), request))  # noqa: B023

    def _warm(self, layout: str) -> None:
        began = time.perf_counter()
        warm_up(self.node.on(layout))
        self.warm.add(layout)
        self.book.write(**{f"warm-up {layout}": {"seconds": time.perf_counter() - began}})

    def guess(self, layout: str) -> float:
        """Seconds that a video will take: what one took, else from the steps, else the issue's target."""
        data = self.book.data
        took = [row["seconds"]["total"] for name, row in data.items() if name.startswith(f"video {layout} ")]
        if took:
            return 1.1 * max(took)
        rows = data.get(f"steps {layout}", {}).values()
        step_ms = max((row["ms"] for row in rows), default=20_000 / data["gpus"])
        return 1.1 * data["sampling_steps"] * step_ms / 1e3 + 15


def default_layouts(world: int) -> list[str]:
    """The two that matter, the engine's own first."""
    if world == 1:
        return ["1x1"]
    other = [f"2x{world // 2}"] if world % 2 == 0 else []
    return [*other, f"1x{world}"] if world == 2 else [f"1x{world}", *other]


def table(data: dict[str, Any]) -> str:
    """The figures in Markdown."""
    width, height = data["size"]
    steps = data["sampling_steps"]
    lines = [
        f"### {data['model']} {width}x{height}x{data['frame_num']}, {steps} steps, {data['quality']}: "
        f"{data['gpus']} x {data['device']}",
        "",
        "| what | step, ms (high, low) | exposed, ms | denoise, s | decode, s | total, s | MHz | W | GiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    official = data.get("official", {})
    for name, row in official.items() if "skipped" not in official else ():
        lines.append(
            f"| official, {name} | {row['ms']:.1f} | - | {steps * row['ms'] / 1e3:.1f} (steps x ms) | - | - "
            f"| {row['clock_mhz']:.0f} | {row['power_w']:.0f} | {row['peak_gib']:.1f} |"
        )
    for key in (key for key in data if key.startswith("steps ")):
        rows = data[key].values()
        ms, exposed = ", ".join(f"{r['ms']:.1f}" for r in rows), "-"
        if all("exposed_ms" in r for r in rows):
            exposed = ", ".join(f"{r['exposed_ms']:.1f} ({r['exposed_ms'] / r['ms']:.2%})" for r in rows)
        last = list(rows)[-1]
        lines.append(
            f"| {key} | {ms} | {exposed} | - | - | - | {last['clock_mhz']:.0f} | {last['power_w']:.0f} "
            f"| {last['peak_gib']:.1f} |"
        )
    layouts = dict.fromkeys(key.split()[1] for key in data if key.startswith("video "))
    for layout in layouts:
        videos = [data[key] for key in data if key.startswith(f"video {layout} ")]
        middle, last = parts.median_video(videos), videos[-1]
        lines.append(
            f"| {layout}, median of {len(videos)} videos | - | - | {middle['denoising']:.2f} "
            f"| {middle['decoding']:.2f} | **{middle['total']:.2f}** | {last['clock_mhz']:.0f} "
            f"| {last['power_w']:.0f} | {last['peak_gib']:.1f} |"
        )
    rung = data["memory"]["rung"]
    lines += ["", f"memory: rung {rung} of the ladder"]
    if "skipped" in official:
        lines.append(f"official: not run, {official['skipped']}")
    found = {name: error for key in data if key.startswith("parity ") for name, error in data[key].items()}
    lines += (f"latents, {name}: relative error {error:.3g}" for name, error in found.items())
    return "\n".join(lines)


def main(given: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--gpus", type=int, default=8, help="ranks to start when torchrun didn't")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--model", choices=["A14B", "I2V", "5B"], default="A14B")
    parser.add_argument("--size", help="such as 832*480; the model's largest unless given")
    parser.add_argument("--frame-num", type=int, help="the model's default unless given")
    parser.add_argument("--sampling-steps", type=int, help="the model's default unless given")
    parser.add_argument("--layouts", nargs="+", help="such as 2x4 1x8; the best two unless given")
    parser.add_argument("--quality", default=LOSSLESS, help="a preset of --told")
    parser.add_argument("--told", help="JSON: the presets object of a reel.json")
    known = ("parity", "official", "steps", "videos")
    parser.add_argument("--parts", nargs="+", choices=known, default=known)
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="of continuous work for each step's figure"
    )
    parser.add_argument("--videos", type=int, default=3, help="of each layout")
    parser.add_argument("--budget", type=float, default=550.0, help="seconds in which every part must end")
    parser.add_argument("--json", type=Path, help="write the figures here as they come")
    parser.add_argument("--resume", action="store_true", help="keep what the JSON file has")
    arguments = parser.parse_args(given)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("benchmarks.node needs CUDA GPUs, torch sees none; --device cpu rehearses on a CPU")
    check_place(arguments.json, arguments.resume)
    if start_ranks("benchmarks.node", arguments.gpus, sys.argv[1:] if given is None else given):
        return
    Run(arguments, Book(arguments.json, arguments.resume, arguments.budget, started())).all()


if __name__ == "__main__":
    main()

"""Layouts over GPUs: step time, exposed communication, scaling, the VAE, the text encoder, a timeline.

    python -m benchmarks.parallel --gpus 2 --json parallel.json --timeline docs [--seconds 20] [--budget 550]

It starts one process a GPU by torchrun (or takes the ranks that torchrun gave it). First the layouts' results
are compared with one GPU's: where one is wrong, nothing is printed about time. Each contestant then runs for
`--seconds` without a pause. Exposed communication is a step's time minus the same step's with the transfers
off, measured by turns. Figures are written as they come; `--resume` skips what the JSON file already has, so
that a call which ran into its time limit can be continued. `--device cpu` rehearses everything at tiny sizes
over gloo.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import _parts, _timeline
from benchmarks._book import Book, check_place
from benchmarks._eight import Measured, report
from benchmarks._expected import sustained_seconds
from benchmarks._layouts import TIMEOUT_SECONDS, TOKENS, Bench, Contestant, contestants
from benchmarks._ranks import join_ranks, start_ranks, started
from benchmarks._together import Timed, alternately, shared, together
from benchmarks._verify import WrongResult, relative_error

CHECK_BLOCKS = 2
PART_SECONDS = {"link": 10, "link_collective": 10, "text": 30, "vae": 60, "vae_recorded": 60}  # and --seconds


def check(bench: Bench, rows: list[Contestant]) -> list[str]:
    """Every real layout's prediction against one GPU's, on a short sequence; WrongResult if one is off.

    In bf16 the distance of two runs is that of each to fp32, so a layout may be a tenth further from fp32
    than one GPU is, and no more than 1.5 times as far from it as both are from fp32.
    """
    blocks, grid = bench.model.blocks, bench.grid
    bench.model.blocks = blocks[:CHECK_BLOCKS]
    bench.set_grid(TOKENS.get(("A14B", "check"), grid) if bench.device.type == "cuda" else grid)
    exact = bench.exact()
    alone = bench.step(Contestant("1x1"))()
    to_exact = relative_error(alone, exact)
    lines = [f"1x1: relative error {to_exact:.3g} to fp32"]
    for one in rows:
        if one.share or one.transport == "off" or one.layout == "1x1":
            continue
        got = bench.step(one)()
        error, between = relative_error(got, exact), relative_error(got, alone)
        worst = shared(
            max(error / max(1.1 * to_exact, 1e-5), between / max(1.5 * to_exact, 1e-5)), bench.device
        )
        if not worst <= 1:
            raise WrongResult(f"{one.name}: relative error {error:.3g} to fp32, {between:.3g} to one GPU, "
                              f"which has {to_exact:.3g}")  # fmt: skip
        lines.append(f"{one.name}: relative error {error:.3g} to fp32, {between:.3g} to one GPU")
    bench.model.blocks = blocks
    bench.set_grid(grid)
    return lines


def run(arguments: argparse.Namespace, book: Book) -> None:
    """All parts, on this rank."""
    device = join_ranks(arguments.device, TIMEOUT_SECONDS)
    model, size = (arguments.model, arguments.size) if device.type == "cuda" else ("tiny", "720p")
    bench = Bench(model, size, arguments.blocks if device.type == "cuda" else 4, device)
    rows = [one for one in contestants(bench.world) if not arguments.only or any(
        part in one.name for part in arguments.only)]  # fmt: skip
    card = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    book.begin(device=card, torch=torch.__version__, gpus=bench.world, model=model, size=size,
               blocks=len(bench.model.blocks), tokens=math.prod(bench.grid))  # fmt: skip
    with torch.inference_mode():
        book.write(checks=check(bench, rows))
        for line in book.data["checks"]:
            book.say(line)
        if not arguments.check_only:
            time_steps(bench, arguments, book, rows)
            timeline(bench, arguments, book, rows)
            parts(bench, arguments, book)
    if "1x1" in book.data["steps"] and "link" in book.data:
        measured = Measured(
            book.data["steps"]["1x1"]["ms"], book.data["link"]["gb_s"], len(bench.model.blocks),
            math.prod(bench.grid), bench.config, bench.dtype.itemsize,
        )  # fmt: skip
        book.write(eight=report(measured, book.data["steps"]))
    if dist.get_rank() == 0:
        print(table(book.data), flush=True)
    bench.close()
    dist.destroy_process_group()


def time_steps(bench: Bench, arguments: argparse.Namespace, book: Book, rows: list[Contestant]) -> None:
    """Every contestant's step that the book hasn't and that there is time for."""
    for group in by_turns(rows):
        if all(one.name in book.data["steps"] for one in group):
            continue
        if not book.left(sum(guess(book, one, arguments.seconds) for one in group), bench.device):
            for one in group:
                book.postpone(one.name)
            continue
        for one, timed in zip(group, measure(bench, group, arguments.seconds), strict=True):
            book.data["steps"][one.name] = timed.json()
            book.say(f"  {one.name}: {timed.ms:.1f} ms, {timed.clock_mhz:.0f} MHz, {timed.power_w:.0f} W")
        book.write()


def by_turns(rows: list[Contestant]) -> list[list[Contestant]]:
    """The rows in order; one that pushes with its twin whose transfers are off, as they are compared."""
    groups: list[list[Contestant]] = []
    for one in rows:
        if one.transport == "off" and any(replace(one, transport="push") in group for group in groups):
            continue
        twin = replace(one, transport="off")
        groups.append([one, twin] if one.transport == "push" and twin in rows else [one])
    return groups


def measure(bench: Bench, group: list[Contestant], seconds: float) -> list[Timed]:
    """A contestant's steps without a pause, or those of two by turns."""
    steps = [bench.step(one) for one in group]
    if len(steps) > 1:
        return alternately(steps, seconds, bench.device)
    return [together(steps[0], seconds, bench.device, parts=group[0].layout == "1x1")]


def parts(bench: Bench, arguments: argparse.Namespace, book: Book) -> None:
    """The link, the text encoder and the VAE; what no two GPUs have run is last and can spoil nothing."""
    cuda, seconds = bench.device.type == "cuda", arguments.seconds / 4
    sizes = (21, 90, 160) if cuda else (2, 2, 4)
    wanted: dict[str, Callable[[], Any]] = {}
    if bench.world == 2:
        wanted["link"] = lambda: _parts.link(bench, 8, "push", min(3.0, arguments.seconds))
        wanted["link_collective"] = lambda: _parts.link(bench, 8, "collective", min(3.0, arguments.seconds))
    wanted["text"] = lambda: _parts.text(bench, 128 if cuda else 12)
    wanted["vae"] = lambda: _parts.vae(bench, seconds, *sizes)
    if cuda:
        wanted["vae_recorded"] = lambda: _parts.vae_recorded(bench, seconds, *sizes)
    for name, measure in wanted.items():
        if name in book.data or (arguments.only and name not in arguments.only):
            continue
        if not book.left(PART_SECONDS[name] + 3 * seconds, bench.device):
            book.postpone(name)
            continue
        book.write(**{name: measure()})
        book.say(f"  {name}: {json.dumps(book.data[name])}")
        if cuda:
            torch.cuda.empty_cache()


def guess(book: Book, one: Contestant, seconds: float) -> float:
    """How long a contestant will take."""
    step = book.data["steps"].get("1x1", {}).get("ms", 25_000.0) / 1e3 / (one.guidance * one.parts)
    return sustained_seconds(step, seconds, profiled=one.layout == "1x1") + 5


def timeline(bench: Bench, arguments: argparse.Namespace, book: Book, rows: list[Contestant]) -> None:
    """A picture of three blocks of the best share (or layout), as the profiler saw rank 0."""
    steps = book.data["steps"]
    pushed = [one for one in rows if one.transport == "push" and one.name in steps]
    if arguments.timeline is None or not pushed or not book.left(30, bench.device):
        return
    blocks = bench.model.blocks
    bench.model.blocks = blocks[:3]
    for layout in dict.fromkeys(one.layout for one in pushed):
        one = min(
            (one for one in pushed if one.layout == layout), key=lambda one: float(steps[one.name]["ms"])
        )
        step = bench.step(one)
        step()
        if dist.get_rank() == 0:
            picture = _timeline.record(step, bench.device, arguments.timeline, f"timeline-{layout}")
            book.say(f"  timeline of {one.name}: {picture}")
        else:
            step()
        dist.barrier()
    bench.model.blocks = blocks


def table(data: dict[str, Any]) -> str:
    """The figures in Markdown."""
    steps = data["steps"]
    one = steps.get("1x1", {}).get("ms", math.nan)
    lines = [
        f"### {data['model']} {data['size']}, {data['blocks']} blocks, {data['gpus']} x {data['device']}",
        "",
        "| step | ms | exposed communication | of one GPU's step | speed-up, efficiency | MHz | W |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in steps.items():
        off = steps.get(name.replace(", push,", ", off,"), {}).get("ms", math.nan)
        exposed = (
            f"{row['ms'] - off:.2f} ms, {(row['ms'] - off) / row['ms']:.2%}" if ", push," in name else "-"
        )
        layout = next(word for word in name.replace(",", "").split() if "x" in word and word[0].isdigit())
        ranks = math.prod(map(int, layout.split("x")))
        speed = one / row["ms"]
        lines.append(
            f"| {name} | {row['ms']:.1f} | {exposed} | {row['ms'] / one:.4f} | {speed:.3f} x, "
            f"{speed / ranks:.1%} | {row['clock_mhz']:.0f} | {row['power_w']:.0f} |"
        )
    for name in ("link", "link_collective"):
        if name in data:
            row = data[name]
            lines.append(f"\n{row['transport']} alone: {row['mb']:.1f} MB each way at {row['gb_s']:.0f} GB/s")
    for name in ("vae", "vae_recorded", "text"):
        if name in data:
            found = {
                k: round(v["ms"], 2) if isinstance(v, dict) else v
                for k, v in data[name].items()
                if not k.startswith("kernels")
            }
            lines.append(f"\n{name}: " + "; ".join(f"{k} {v}" for k, v in found.items()))
    for row in data.get("eight", {}).get("rows", []):
        lines.append(
            "\nmodel: " + ", ".join(f"{k} {v if isinstance(v, str) else round(v, 4)}" for k, v in row.items())
        )
    return "\n".join([*lines, "", *data.get("checks", [])])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--gpus", type=int, default=2, help="ranks to start when torchrun didn't")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--model", choices=["A14B", "5B"], default="A14B")
    parser.add_argument("--size", choices=["720p", "480p"], default="720p")
    parser.add_argument("--blocks", type=int, default=40, help="blocks of a step")
    parser.add_argument("--seconds", type=float, default=20.0, help="of continuous work for each contestant")
    parser.add_argument("--only", nargs="*", default=[], help="contestants and parts whose name contains one")
    parser.add_argument("--budget", type=float, default=550.0, help="seconds in which all must end")
    parser.add_argument("--json", type=Path, help="write the figures here as they come")
    parser.add_argument("--resume", action="store_true", help="keep what the JSON file has")
    parser.add_argument("--check-only", action="store_true", help="compare results, measure nothing")
    parser.add_argument("--timeline", type=Path, metavar="FOLDER", help="draw timelines into this folder")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("benchmarks.parallel needs CUDA GPUs, torch sees none; --device cpu rehearses on a CPU")
    check_place(arguments.json, arguments.resume)
    if start_ranks("benchmarks.parallel", arguments.gpus, sys.argv[1:]):
        return
    run(arguments, Book(arguments.json, arguments.resume, arguments.budget, started()))


if __name__ == "__main__":
    main()

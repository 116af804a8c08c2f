"""The quality presets' speed from one run on one GPU: blocks, floors, and a modelled video of 8 GPUs.

    python -m benchmarks.preset_speed [--seconds 20] [--quality out/presets.json] [--json FILE]

Official blocks, the lossless one, the 8-bit one by each 8-bit attention, the floor that 8-bit libraries set
and each part alone run for `--seconds` without a pause, clock and power beside the median. Each is first
held to fp32 or fp64 within the bound that stands beside its error; one that is wrong or fails gets no figure.
`--json` is written after each, so a run that is cut off keeps its figures. A video's seconds are modelled
from these and from each preset's skip pattern (`--quality`, made by `benchmarks.presets`);
`--figures FILE` models them from an earlier run's `--json` and needs no GPU.

`--device cpu` rehearses all of it on tiny shapes with emulated 8 bits: those times mean nothing.
"""

import argparse
import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import _preset_tables as tables
from benchmarks import _variants as variants
from benchmarks._preset_run import Run
from benchmarks._sections import write_json
from benchmarks._video_model import Assumptions, patterns

REHEARSAL = "small"  # model of `--device cpu`


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    arguments = parse(argv)
    try:
        skips = patterns(arguments.quality)
        given = assumptions(arguments)
    except ValueError as error:
        sys.exit(str(error))
    if arguments.figures:
        report = json.loads(arguments.figures.read_text())
        if arguments.attention:
            report = by_attention(report, arguments.attention)
        print(tables.text(report, skips, given))
        return
    if arguments.device == "cuda":
        if not torch.cuda.is_available():
            sys.exit("benchmarks.preset_speed needs a CUDA GPU; torch sees none (--device cpu rehearses it)")
        if torch.cuda.get_device_capability() < (9, 0):
            sys.exit("benchmarks.preset_speed needs compute capability 9.0: row-wise e4m3 products")
    model = arguments.model if arguments.device == "cuda" else REHEARSAL
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)

    def write(report: dict[str, Any]) -> None:
        if arguments.json:
            model_of = {"assumptions": asdict(given), "modelled": tables.modelled(report, skips, given)}
            write_json(arguments.json, report | model_of)

    with torch.no_grad():
        run = Run(variants.Share(model, "720p", 8), arguments.seconds, arguments.device)
        run.go(arguments.only, arguments.budget, write)
    report = run.report()
    write(report)
    print(tables.text(report, skips, given), flush=True)
    if run.failed:
        sys.exit(1)


def by_attention(report: dict[str, Any], backend: str) -> dict[str, Any]:
    """The report as with a tuning table that names this 8-bit attention; exits where it has no row."""
    results, row = dict(report["results"]), f"{tables.EIGHT}, attention by {backend}"
    if row not in results:
        sys.exit(f"--attention {backend}: the figures have no row {row!r}, only {', '.join(results)}")
    before = results.pop(tables.EIGHT, None)
    results[tables.EIGHT] = results.pop(row)
    if before is not None:
        results[f"{tables.EIGHT}, attention as chosen in that run"] = before
    return report | {"results": results}


def assumptions(arguments: argparse.Namespace) -> Assumptions:
    """What the model of a video takes from the flags. ValueError for what can't be."""
    return Assumptions(
        variants.CONFIGS[arguments.model].num_layers,
        arguments.steps,
        communication=arguments.communication,
        decode_seconds=arguments.decode_seconds,
        decode_efficiency=arguments.decode_efficiency,
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", choices=["A14B", "5B"], default="A14B")
    parser.add_argument("--seconds", type=float, default=20.0, help="of continuous work for each contestant")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds after which none begins")
    parser.add_argument("--only", nargs="*", default=[], help="contestants whose name contains one of these")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quality", type=Path, help="what benchmarks.presets wrote: the skip patterns")
    parser.add_argument("--figures", type=Path, help="an earlier run's --json: model only, measure nothing")
    parser.add_argument(
        "--attention", help="with --figures: the preset's 8-bit attention, instead of that run's"
    )
    parser.add_argument("--steps", type=int, default=Assumptions.steps, help="of the modelled video")
    parser.add_argument(
        "--communication", type=float, default=Assumptions.communication, help="exposed, of the blocks' time"
    )
    parser.add_argument("--decode-seconds", type=float, help="of the VAE on one GPU; else not counted")
    parser.add_argument(
        "--decode-efficiency", type=float, default=Assumptions.decode_efficiency, help="over 8 GPUs"
    )
    parser.add_argument("--json", type=Path, help="also write the figures here, after each contestant")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()

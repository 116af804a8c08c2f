"""One transformer block on one GPU: the official computation, the compiled rewrite, ours, and the floor.

    python -m benchmarks.block [--model A14B] [--size 720p] [--shares 8] [--seconds 20] [--json FILE]

Every contestant runs for `--seconds` without a pause after 3 s of warm-up, with the clock and the power of
that time beside its median. Nothing is printed when a result is wrong (`benchmarks._verify`). On an H100
the official block's two known sustained times must be reproduced within 5 %, or no ratio is printed; other
cards are compared by ratio within the run alone.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import _variants as variants
from benchmarks._measure import Step, Sustained, profile_kernels, sustained
from benchmarks._verify import check_attention, check_block
from kernels.attention import choice

# Sustained milliseconds of the official block on an H100 80GB HBM3 (A14B, 720p, share of 8).
H100 = {"official, FlashAttention-2": 60.0, "official, cuDNN": 44.0}


def contestants(inputs: variants.Inputs) -> dict[str, Callable[[], Step]]:
    """Makers of the steps, by the name that the table shows; made one at a time to spare memory."""
    flash2, cudnn = variants.library("flash2"), variants.library("cudnn")
    own = variants.own_sequence(inputs)
    have_flash4 = choice("self", torch.bfloat16, 128, inputs.device)[0] == "flash4"
    plain_best = variants.library("flash4") if have_flash4 else cudnn
    best = "flash-attn-4" if have_flash4 else "cuDNN"
    return {
        "official, FlashAttention-2": lambda: variants.official(inputs, flash2),
        "official, cuDNN": lambda: variants.official(inputs, cudnn),
        f"compiled, {best} as it comes": lambda: variants.compiled(inputs, plain_best, own.cross),
        "compiled, our attention choice": lambda: variants.compiled(inputs, own.attend, own.cross),
        "ours": lambda: variants.ours(inputs),
        f"floor, {best} as it comes": lambda: variants.floor(inputs, plain_best, own.cross),
        "floor, our attention choice": lambda: variants.floor(inputs, own.attend, own.cross),
    }


def run_share(share: variants.Share, seconds: float, only: list[str]) -> dict[str, Any]:
    """All contestants on one share: checks, then name -> figures."""
    checks = check_attention(share)
    inputs = variants.Inputs(share)
    results: dict[str, Sustained] = {}
    for name, make in contestants(inputs).items():
        if only and not any(part in name for part in only):
            continue
        step = make()
        results[name] = sustained(step, seconds)
        if name == "ours":
            kernels = profile_kernels(step)
        print(f"  {name}: {results[name].ms:.2f} ms", file=sys.stderr, flush=True)
        del step
        torch.cuda.empty_cache()
    return {
        "share": asdict(share) | {"tokens": share.tokens, "heads": share.heads},
        "attention": {k: choice(k, torch.bfloat16, 128, inputs.device) for k in ("self", "cross")},
        "checks": checks,
        "results": {name: asdict(result) for name, result in results.items()},
        "kernels of ours": kernels if "ours" in results else {},
    }


def trusted(report: dict[str, Any], device: str) -> str | None:
    """Why ratios to the official block can't be trusted, or None."""
    share = report["share"]
    known = (share["model"], share["size"], share["share"]) == ("A14B", "720p", 8)
    if not known or "H100" not in device:
        return None
    for name, ms in H100.items():
        got = report["results"].get(name, {}).get("ms", math.nan)
        if not abs(got / ms - 1) <= 0.05:
            return f"{name} took {got:.1f} ms where an H100 takes {ms}: no ratio is printed"
    return None


def table(report: dict[str, Any], device: str) -> str:
    """The share's figures in Markdown."""
    share = report["share"]
    lines = [
        f"### {share['model']} {share['size']}, share of {share['share']} on {device}",
        "",
        "| contestant | ms | to official FA2 | to compiled | attention | products | other | MHz | W |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    problem = trusted(report, device)
    base = report["results"].get("official, FlashAttention-2", {}).get("ms", math.nan)
    compiled = min((r["ms"] for n, r in report["results"].items() if "compiled" in n), default=math.nan)
    for name, r in report["results"].items():
        less = (
            "-"
            if math.isnan(compiled) or name.startswith(("official", "compiled"))
            else f"{100 * (compiled / r['ms'] - 1):+.1f} %"
        )
        ratio = "-" if problem or math.isnan(base) else f"{base / r['ms']:.2f} x"
        attention, products = (r["parts"].get(k, 0.0) for k in ("attention", "products"))
        other = sum(r["parts"].values()) - attention - products
        lines.append(
            f"| {name} | {r['ms']:.2f} | {ratio} | {less} | {attention:.2f} | {products:.2f} | {other:.2f} "
            f"| {r['clock_mhz']:.0f} | {r['power_w']:.0f} |"
        )
    return "\n".join([*lines, *([f"\n{problem}"] if problem else []), "", *report["checks"]])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", choices=["A14B", "5B"], default="A14B")
    parser.add_argument("--size", choices=["720p", "480p"], default="720p")
    parser.add_argument("--shares", type=int, nargs="+", default=[8], help="GPUs the sequence is split over")
    parser.add_argument("--seconds", type=float, default=20.0, help="of continuous work for each contestant")
    parser.add_argument("--only", nargs="*", default=[], help="contestants whose name contains one of these")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.block needs a CUDA GPU; torch sees none")
    if (arguments.model, arguments.size) not in variants.GRIDS:
        sys.exit(f"{arguments.model} has no {arguments.size} size")
    device = torch.cuda.get_device_name()
    reports = []
    with torch.no_grad():
        block_check = check_block(arguments.model)
        print(block_check, file=sys.stderr, flush=True)
        for share in arguments.shares:
            report = run_share(
                variants.Share(arguments.model, arguments.size, share), arguments.seconds, arguments.only
            )
            report["checks"].insert(0, block_check)
            reports.append(report)
            print(table(report, device), flush=True)
            if arguments.json:
                document = {"device": device, "torch": torch.__version__, "reports": reports}
                arguments.json.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()

"""Which reuse loses least for the arithmetic it saves: whole steps, self-attention alone, or both.

    python -m benchmarks.reuse [--model models/demo] [--count 8] [--out out/reuse.json]

Every block stays in the weights' own numbers, so that reuse alone is seen. Calibration's captions are made
under each setting and compared with their lossless clips. What is saved is counted at the proportions of
T2V-A14B at 1280x720 x 81 frames, where self-attention with its projections is most of a block; on the demo
model it is little, so its seconds would say nothing. Prints a table; rows appear as they are made.
"""

import json
from dataclasses import asdict
from typing import Any

import numpy as np

from benchmarks.calibrate import Parts, Trial, arguments, device_flag, trial_of
from engine.config import DiTConfig, Work
from engine.presets import CACHED

A14B = DiTConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
TOKENS = 75_600  # of 1280x720 x 81 frames
ALWAYS = 1e9  # a threshold that leaves the cap and the edges alone to decide

# Name to settings; what isn't named is off.
SETTINGS: dict[str, Parts] = {
    "attention, 1 in a row": {"attention_threshold": ALWAYS, "max_reuse": 1},
    "steps to 0.15, 1 in a row": {"step_threshold": 0.15, "max_reuse": 1},
    "attention to 0.25": {"attention_threshold": 0.25, "max_reuse": 3},
    "steps to 0.25, 2 in a row": {"step_threshold": 0.25, "max_reuse": 2},
    "steps to 0.12, attention to 0.3": {"step_threshold": 0.12, "attention_threshold": 0.3, "max_reuse": 3},
    "attention to 0.15": {"attention_threshold": 0.15, "max_reuse": 3},
    "attention to 0.4, first 5": {"attention_threshold": 0.4, "max_reuse": 5, "first": 5},
    "steps to 0.12, 1 in a row, first 4": {"step_threshold": 0.12, "max_reuse": 1, "first": 4, "last": 2},
}


def attention_share(config: DiTConfig, tokens: int) -> float:
    """The share of a block's arithmetic that a kept self-attention saves: q, k, v, o and attention itself.

    In units of 4 * tokens * dim multiply-adds: tokens + 2 dim for self-attention, dim + text for
    cross-attention (its keys and values are kept), ffn for the feed-forward.
    """
    saved = tokens + 2 * config.dim
    return saved / (saved + config.dim + config.text_len + config.ffn_dim)


def saved(works: list[Work], share: float) -> float:
    """The part of the blocks' arithmetic that wasn't done; a step without its unconditional pass did half."""
    steps = sum(work.steps_computed + work.steps_reused for work in works)
    kept = sum(work.steps_reused + share * work.attention_reused for work in works)
    return kept / steps


def row(trial: Trial, parts: Parts, share: float) -> dict[str, Any]:
    """One setting's line."""
    blocks = trial.maker.pipelines["lossless"].spec.dit.num_layers
    clips = trial.clips(CACHED, {CACHED: {"keep_blocks": list(range(blocks)), **parts}})
    decibels, works = [d for _, d, _ in clips], [work for *_, work in clips]
    return {
        "psnr_db": round(float(np.mean(decibels)), 2),
        "psnr_db_worst": round(min(decibels), 2),
        "steps reused": sum(work.steps_reused for work in works) / len(works),
        "attention reused": sum(work.attention_reused for work in works) / len(works),
        "saved": round(saved(works, share), 3),
        "each": [[round(d, 2), asdict(work)] for _, d, work in clips],
    }


def table(found: dict[str, dict[str, Any]]) -> str:
    """The rows as Markdown, the least saved first."""
    lines = ["| reused | saved | PSNR, dB | worst | steps reused | attention reused |", "|---" * 6 + "|"]
    for name, one in sorted(found.items(), key=lambda item: float(item[1]["saved"])):
        lines.append(
            f"| {name} | {one['saved']:.0%} | {one['psnr_db']:.2f} | {one['psnr_db_worst']:.2f} "
            f"| {one['steps reused']:.1f} | {one['attention reused']:.1f} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Make, compare, print."""
    parser = arguments(__doc__ or "", 8, "out/reuse.json")
    device_flag(parser)
    args = parser.parse_args(argv)
    trial = trial_of(args, args.device)
    share, found = attention_share(A14B, TOKENS), {}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for name, parts in SETTINGS.items():
        found[name] = row(trial, parts, share)
        print(name, json.dumps({k: v for k, v in found[name].items() if k != "each"}), flush=True)
        args.out.write_text(json.dumps({"share": share, "settings": found}, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()

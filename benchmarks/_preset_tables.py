"""The presets' speed in Markdown: blocks with a modelled video of 8 GPUs, floors, errors, targets."""

import math
from collections.abc import Mapping
from typing import Any

from benchmarks._video_model import GPUS, Assumptions, BlockTimes, Pattern, denoising
from benchmarks.block import trusted
from engine.presets import CACHED, EIGHT_BIT
from engine.presets import LOSSLESS as LOSSLESS_PRESET

FLASH2, CUDNN, LOSSLESS = "official, FlashAttention-2", "official, cuDNN", "ours, lossless"
EIGHT, KEPT, FLOOR = "ours, 8bit", "ours, 8bit with a kept attention", "floor of 8 bits"
TARGET_MS, STRETCH_MS, TARGET_CACHE, TARGET_SECONDS = 23.0, 20.0, 1.35, 60.0  # A14B, 720p, share of 8


def alone(name: str) -> str:
    """The contestant's name of an 8-bit attention by itself."""
    return f"attention, 8 bits by {name}"


def milliseconds(report: Mapping[str, Any], name: str) -> float:
    """A contestant's figure; NaN where there is none."""
    return float(report["results"].get(name, {}).get("ms", math.nan))


def modelled(
    report: Mapping[str, Any], skips: Mapping[str, Pattern], given: Assumptions
) -> dict[str, dict[str, Any]]:
    """Row's name -> its block's contestant, modelled step (ms) and video (s); measured rows only."""
    lossless, eight = milliseconds(report, LOSSLESS), milliseconds(report, EIGHT)
    kept = milliseconds(report, KEPT)
    whole = {name: BlockTimes(milliseconds(report, name)) for name in (FLASH2, CUDNN)}
    whole[LOSSLESS_PRESET] = BlockTimes(lossless)
    rows: dict[str, tuple[str, BlockTimes, Pattern]] = {
        name: (LOSSLESS if name == LOSSLESS_PRESET else name, times, Pattern())
        for name, times in whole.items()
    }
    times = BlockTimes(lossless, eight, None if math.isnan(kept) else kept)
    rows |= {name: (EIGHT, times, pattern) for name, pattern in skips.items()}
    found = {}
    for name, (contestant, each, skip) in rows.items():
        if skip.attention_reused and each.kept is None:
            continue
        seconds = denoising(each, skip, given)
        if math.isnan(seconds):
            continue
        found[name] = {
            "contestant": contestant,
            "step_ms": 1e3 * seconds / given.steps,
            "denoising_s": seconds,
            "video_s": seconds + given.decoding,
            "steps_reused": skip.steps_reused,
            "guidance_reused": skip.guidance_reused,
            "attention_reused": skip.attention_reused,
            "keep_blocks": None if skip.bits is None else list(skip.bits.keep_blocks),
            "first_steps": None if skip.bits is None else skip.bits.first_steps,
            "keeps_quality_floor": skip.keeps_floor,
        }
    return found


def text(report: dict[str, Any], skips: Mapping[str, Pattern], given: Assumptions) -> str:
    """All of it."""
    share = report["share"]
    rows = modelled(report, skips, given)
    title = f"### Presets: {share['model']} {share['size']}, share of {share['share']} on {report['device']}"
    parts = [
        [title, ""],
        preset_table(report, rows),
        ["", "Modelled, not measured:", *(f"- {line}" for line in given.lines()), *pattern_lines(rows)],
        ["", *part_table(report)],
        ["", *stack_lines(report)],
        ["", *targets(report, rows)] if (share["model"], share["size"]) == ("A14B", "720p") else [],
        ["", *(f"- no figure: {name}: {reason}" for name, reason in report["problems"].items())],
    ]
    return "\n".join(line for part in parts for line in part)


def number(value: float, form: str = ".2f") -> str:
    """A figure, or a dash where there is none."""
    return "-" if math.isnan(value) else f"{value:{form}}"


def ratio(report: dict[str, Any], name: str, to: str) -> str:
    """How many times as fast a contestant is; a dash where the official base isn't to be trusted."""
    value = milliseconds(report, to) / milliseconds(report, name)
    if to == FLASH2 and trusted(report, report["device"]):
        return "-"
    return "-" if math.isnan(value) else f"{value:.2f} x"


def preset_table(report: dict[str, Any], rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Presets and the official blocks; 8-bit blocks by other attentions have no video of their own."""
    lines = [
        f"| preset | block ms | to official FA2 | to lossless | error | step of {GPUS} GPUs ms (modelled) "
        "| video s (modelled) | MHz | W |",
        "|---" * 9 + "|",
    ]
    others = [name for name in report["results"] if name.startswith("ours") and name not in (LOSSLESS, EIGHT)]
    for name, row in [*rows.items(), *((name, {"contestant": name}) for name in others)]:
        contestant = str(row["contestant"])
        result = report["results"][contestant]
        lines.append(
            f"| {name} | {result['ms']:.2f} | {ratio(report, contestant, FLASH2)} "
            f"| {ratio(report, contestant, LOSSLESS)} | {result['error']:.2g} "
            f"| {number(row.get('step_ms', math.nan), '.0f')} "
            f"| {number(row.get('video_s', math.nan), '.1f')} "
            f"| {number(result['clock_mhz'], '.0f')} | {number(result['power_w'], '.0f')} |"
        )
    problem = trusted(report, report["device"]) if FLASH2 in report["results"] else None
    same = [f"The error of '{KEPT}' is to the same block without it."] if KEPT in report["results"] else []
    return [*lines, *(["", *same] if same else []), *(["", problem] if problem else [])]


def pattern_lines(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What each 8-bit preset is taken to leave out."""
    lines = []
    for name, row in rows.items():
        if row["keep_blocks"] is None:
            continue
        kept = {None: "not known", True: "kept", False: "MISSED"}[row["keeps_quality_floor"]]
        lines.append(
            f"- {name}: blocks {row['keep_blocks']} and the first {row['first_steps']} steps lossless; "
            f"steps reused {row['steps_reused']:.1%}; of the computed ones guidance reused "
            f"{row['guidance_reused']:.1%}, attention reused {row['attention_reused']:.1%}; "
            f"quality floor {kept}"
        )
    if CACHED not in rows:
        lines.append(f"- {CACHED}: not modelled without its measured skip pattern (--quality) and block")
    return lines


def part_table(report: dict[str, Any]) -> list[str]:
    """The floor, and each part alone."""
    lines = ["| floors and parts alone | ms | error | MHz | W |", "|---" * 5 + "|"]
    for name, result in report["results"].items():
        if name.startswith(("ours", "official")):
            continue
        by = f", attention by {result['attention']}" if "attention" in result else ""
        lines.append(
            f"| {name}{by} | {result['ms']:.2f} | {result['error']:.2g} (bound {result['bound']:g}) "
            f"| {number(result['clock_mhz'], '.0f')} | {number(result['power_w'], '.0f')} |"
        )
    return [
        *lines,
        "",
        "Products are on operands in e4m3 already. So is cuDNN's 8-bit attention; ours quantises its own. "
        "The floor is six products, that attention, cross-attention, and copies of the passes' bytes.",
    ]


def stack_lines(report: Mapping[str, Any]) -> list[str]:
    """Errors of a block and of a step's stack, on a short sequence of full width, random weights."""
    blocks, errors = report["stack"]["blocks"], report["stack"]["errors"]
    lines = ["| relative error to fp32, random weights | one block | a stack of them |", "|---" * 3 + "|"]
    for name, error in errors.items():
        one = report["results"].get(name, {}).get("error", math.nan)
        lines.append(f"| {name} | {number(one, '.3g')} | {error:.3g} |")
    return [
        *lines,
        "",
        f"The stack: {blocks} blocks in a row, all of one block's weights, all in the row's numbers.",
    ]


def targets(report: dict[str, Any], rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Each target with what came, in words."""
    block = milliseconds(report, EIGHT)
    lines = [
        said(f"`8bit` block at most {TARGET_MS:g} ms", block, "ms", block <= TARGET_MS),
        said(f"stretch: at most {STRETCH_MS:g} ms", block, "ms", block <= STRETCH_MS),
    ]
    if CACHED in rows and EIGHT_BIT in rows:
        gain = rows[EIGHT_BIT]["denoising_s"] / rows[CACHED]["denoising_s"]
        video = rows[CACHED]["video_s"]
        whole = "video" if rows[CACHED]["video_s"] != rows[CACHED]["denoising_s"] else "denoising alone"
        lines += [
            said(
                f"`8bit-cache` at least {TARGET_CACHE:g} x `8bit`, modelled", gain, "x", gain >= TARGET_CACHE
            ),
            said(f"under {TARGET_SECONDS:g} s, modelled, {whole}", video, "s", video < TARGET_SECONDS),
        ]
    return ["Targets on an H100:", *lines]


def said(target: str, value: float, unit: str, met: bool) -> str:
    """One target's line."""
    if math.isnan(value):
        return f"- {target}: no figure"
    return f"- {target}: {value:.2f} {unit}, {'met' if met else 'not met'}"

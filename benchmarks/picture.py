"""Draws where each millisecond of a block goes: stacked bars (SVG) from `benchmarks.block --json`.

python -m benchmarks.picture block.json block.svg [--report 0]
"""

import argparse
import json
from html import escape
from pathlib import Path
from typing import Any

COLOURS = {
    "attention": "#3b6ea8",
    "products": "#d08a2e",
    "elementwise": "#6aa84f",
    "copies": "#8e6bb0",
}
ROW, BAR, LEFT, WIDTH = 34, 22, 270, 560  # pixels: row pitch, bar height, label column, longest bar


def parts_of(result: dict[str, Any]) -> dict[str, float]:
    """The sustained milliseconds by kind, in the proportions of the profile.

    Work is queued ahead, so nothing idles; the profile comes after a pause, at a higher clock.
    """
    parts = {kind: result["parts"].get(kind, 0.0) for kind in COLOURS}
    total = sum(parts.values())
    return {kind: ms * result["ms"] / total for kind, ms in parts.items()}


def text(x: float, y: float, content: str, anchor: str = "start", weight: str = "normal") -> str:
    """One line of text."""
    place = f'x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}" font-weight="{weight}"'
    return f"<text {place}>{escape(content)}</text>"


def bar(y: float, name: str, result: dict[str, Any], scale: float) -> list[str]:
    """One contestant's label, segments and total."""
    items = [text(LEFT - 8, y + 16, name, "end", "bold" if name == "ours" else "normal")]
    x = float(LEFT)
    for kind, ms in parts_of(result).items():
        if ms <= 0:
            continue
        tip = f"{name}: {kind} {ms:.2f} ms"
        items.append(
            f'<rect x="{x:.1f}" y="{y}" width="{ms * scale:.1f}" height="{BAR}" fill="{COLOURS[kind]}">'
            f"<title>{escape(tip)}</title></rect>"
        )
        x += ms * scale
    figure = f"{result['ms']:.1f} ms, {result['clock_mhz']:.0f} MHz, {result['power_w']:.0f} W"
    return [*items, text(x + 6, y + 16, figure)]


def draw(report: dict[str, Any], device: str) -> str:
    """The picture of one share."""
    share, results = report["share"], report["results"]
    scale = WIDTH / max(result["ms"] for result in results.values())
    height = 70 + ROW * (len(results) + 1)
    title = (
        f"One block, {share['model']} {share['size']}, share of {share['share']} GPUs, sustained on {device}"
    )
    items = [text(10, 24, title, weight="bold")]
    for row, (name, result) in enumerate(results.items()):
        items += bar(44 + ROW * row, name, result, scale)
    x, y = LEFT, 44 + ROW * len(results) + 8
    for kind, colour in COLOURS.items():
        items += [
            f'<rect x="{x}" y="{y}" width="12" height="12" fill="{colour}"/>',
            text(x + 17, y + 11, kind),
        ]
        x += 110
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 210}" height="{height}" '
        'font-family="sans-serif" font-size="13"><rect width="100%" height="100%" fill="#fff"/>\n'
        + "\n".join(items)
        + "\n</svg>\n"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("figures", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--report", type=int, default=0, help="which share, in the order that was run")
    arguments = parser.parse_args()
    document = json.loads(arguments.figures.read_text())
    arguments.out.write_text(draw(document["reports"][arguments.report], document["device"]))


if __name__ == "__main__":
    main()

"""Draws the loss curves that training left behind: `python -m models.demo.train.curves` writes curves.svg."""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from models.demo.train.common import MODEL_DIR

PANELS = (
    ("vae", "absolute", "VAE: absolute error"),
    ("text", "loss", "Text encoder: cross-entropy a slot"),
    ("classifier", "loss", "Judge: sum of cross-entropies"),
    ("high", "loss", "High-noise expert: flow error"),
    ("low", "loss", "Low-noise expert: flow error"),
)
WIDTH, HEIGHT, GAP = 300, 170, 46


def panel(curve: list[dict[str, float]], key: str, title: str, x0: float, y0: float) -> list[str]:
    """One curve over steps, the loss on a logarithmic axis between its ends."""
    rows = curve[1:] if len(curve) > 3 else curve  # the first window is still falling from the start
    steps, values = [row["step"] for row in rows], [math.log10(row[key]) for row in rows]
    low, high = min(values), max(values)
    span = max(high - low, 1e-9)
    points = " ".join(
        f"{x0 + step / steps[-1] * WIDTH:.1f},{y0 + (high - value) / span * HEIGHT:.1f}"
        for step, value in zip(steps, values, strict=True)
    )
    return [
        f'<text x="{x0}" y="{y0 - 8}" font-weight="bold">{title}</text>',
        f'<rect x="{x0}" y="{y0}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#bbb"/>',
        f'<polyline points="{points}" fill="none" stroke="#2166ac" stroke-width="1.5"/>',
        f'<text x="{x0 + 4}" y="{y0 + 14}">{10**high:.3g}</text>',
        f'<text x="{x0 + 4}" y="{y0 + HEIGHT - 5}">{10**low:.3g}</text>',
        f'<text x="{x0 + WIDTH}" y="{y0 + HEIGHT + 15}" text-anchor="end">{steps[-1]:,.0f} steps, '
        f"{rows[-1]['seconds']:.0f} s</text>",
    ]


def picture(curves: dict[str, Any]) -> str:
    """The panels as one SVG."""
    parts: list[str] = []
    for index, (name, key, title) in enumerate(PANELS):
        x0, y0 = 20 + index % 3 * (WIDTH + GAP), 34 + index // 3 * (HEIGHT + GAP)
        parts += panel(curves[name]["curve"], key, title, x0, y0)
    width, height = 3 * (WIDTH + GAP), 2 * (HEIGHT + GAP) + 20
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
        + "\n".join(parts)
        + "</svg>\n"
    )


def main() -> None:
    """Read the curves, write the picture beside the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    args = parser.parse_args()
    folder = args.model / "train" / "curves"
    curves = {name: json.loads((folder / f"{name}.json").read_text()) for name, _, _ in PANELS}
    (args.model / "curves.svg").write_text(picture(curves))
    print(args.model / "curves.svg")


if __name__ == "__main__":
    main()

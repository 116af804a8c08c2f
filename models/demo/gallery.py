"""The README's gallery: twelve prompts, each with three moments of its video on one contact sheet.

    python -m models.demo.gallery [--out docs/images/gallery.png]

Prompt i is made once, with seed i; nothing is picked.
"""

import argparse
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from engine.load import load_pipeline
from engine.requests import resolve
from models.demo.frames import Frames

PROMPTS = (
    "A large red star glides to the right while spinning, under a starry sky",
    "A small yellow ball bounces up and down on a checkered background",
    "A purple heart grows in front of a beige wall",
    "A striped green triangle rises in a sunny day sky",
    "An orange ring moves left passes in front of a blue square moving right",
    "A white cross spins on a plain black background",
    "A pink circle falls quickly at night, as the camera pans right",
    "On the left, a red square moves up, on the right, a green star moves down",
    "A dotted blue heart swings from side to side on a grey background",
    "A checkered purple square slides to the right on a striped background",
    "A tiny white star shrinks under the stars",
    "A yellow triangle spins above a pink ring spinning, over a dotted backdrop",
)
COLUMNS, MOMENTS, LINE = 3, 3, 15


def sheet(videos: list[np.ndarray], prompts: tuple[str, ...], gap: int = 8) -> Image.Image:
    """MOMENTS frames of each video side by side under its prompt, COLUMNS videos a row."""
    side = videos[0].shape[1]
    width, height = MOMENTS * side + gap, side + 2 * LINE + gap
    rows = -(-len(videos) // COLUMNS)
    picture = Image.new("RGB", (COLUMNS * width + gap, rows * height + gap), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(12)
    for index, (video, prompt) in enumerate(zip(videos, prompts, strict=True)):
        x, y = gap + index % COLUMNS * width, gap + index // COLUMNS * height
        for line, text in enumerate(textwrap.wrap(prompt, 60)[:2]):
            pen.text((x, y + line * LINE), text, fill="black", font=font)
        for moment in range(MOMENTS):
            frame = video[round((0.1 + 0.4 * moment) * (len(video) - 1))]
            picture.paste(Image.fromarray(frame), (x + moment * side, y + 2 * LINE))
    return picture


def main() -> None:
    """Generate and draw."""
    root = Path(__file__).resolve().parents[2]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=root / "models" / "demo")
    parser.add_argument("--out", type=Path, default=root / "docs" / "images" / "gallery.png")
    args = parser.parse_args()
    pipeline = load_pipeline(args.model)
    videos = []
    for seed, prompt in enumerate(PROMPTS):
        sink = Frames()
        pipeline.generate(resolve(pipeline.spec, prompt, seed=seed), sink)
        videos.append(sink.array())
        print(f"{seed + 1} of {len(PROMPTS)}: {prompt}", flush=True)
    sheet(videos, PROMPTS).save(args.out, optimize=True)
    print(args.out)


if __name__ == "__main__":
    main()

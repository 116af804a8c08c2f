"""Take the README's pictures of the page from a running stack: `python scripts/screenshots.py [--stack DIR]`.

Makes a few videos first if there are fewer than six, then photographs the page in Debian's Chromium on a desk
and on a telephone, by day and by night, into docs/images/.
"""

import argparse
import io
import os
import shutil
import time
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, sync_playwright

from infra.client import ReelClient
from infra.stack_env import use_stack

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "images"
MOST_BYTES = 300_000
PROMPTS = (
    "A striped green triangle rises in a sunny day sky",
    "A large orange square slides to the right on a striped background",
    "A pink circle falls slowly at night",
    "A blue ring moves to the left on a checkered background",
    "A small yellow ball bounces up and down on a plain grey background",
    "A large purple heart grows in front of a beige wall",
)
SHOTS = {
    "page-desktop": {"width": 1280, "height": 1000},
    "page-phone": {"width": 390, "height": 844},
}


def make_videos(client: ReelClient) -> None:
    """Fill the gallery."""
    done = client.call("GET", "/v1/jobs", params={"state": "succeeded", "limit": 6})["data"]
    jobs = [client.submit({"prompt": prompt, "seed": 7}) for prompt in PROMPTS[: 6 - len(done)]]
    for job in jobs:
        for seen in client.follow(job["id"], poll_seconds=1.0):
            print(f"\r{seen['state']} {seen['progress']:4.0%} {job['id']}", end="", flush=True)
    print()


def photograph(browser: Browser, url: str, key: str, name: str, scheme: str) -> None:
    """One picture: a finished video selected, as its owner sees it."""
    size = SHOTS[name]
    phone = size["width"] < 500
    context = browser.new_context(
        viewport=size, color_scheme=scheme, device_scale_factor=2 if phone else 1, is_mobile=phone,
        has_touch=phone,
    )  # fmt: skip
    page = context.new_page()
    page.goto(url)
    page.fill("#key", key)
    page.press("#key", "Enter")
    page.wait_for_selector(".card img")
    page.click(".card")
    page.wait_for_selector("#video:visible")
    page.fill("#prompt", PROMPTS[1])
    time.sleep(2.5)
    if phone:
        page.evaluate("window.scrollTo(0, document.getElementById('submit').offsetTop - 120)")
    shot = page.screenshot()
    context.close()
    save(shot, FOLDER / f"{name}-{scheme}.png")


def save(png: bytes, path: Path) -> None:
    """Write it with a palette, halved again and again until it is small enough."""
    image = Image.open(io.BytesIO(png)).convert("RGB")
    colours = 256
    while True:
        out = io.BytesIO()
        image.quantize(colours, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
        if len(out.getvalue()) <= MOST_BYTES or colours <= 16:
            break
        colours //= 2
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(out.getvalue())
    print(f"{path} {path.stat().st_size / 1000:.0f} kB, {colours} colours")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stack", type=Path, help="data dir of the running stack; else the default one")
    use_stack(parser.parse_args().stack, "REEL_API_KEY", "REEL_API_URL")
    with ReelClient.from_env() as client, sync_playwright() as play:
        make_videos(client)
        browser = play.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        for name in SHOTS:
            for scheme in ("light", "dark"):
                photograph(browser, client.url, os.environ["REEL_API_KEY"], name, scheme)
        browser.close()


if __name__ == "__main__":
    main()

"""Decode an untrusted image and write it anew; runs alone in a process with limits (see `api.sanitize`).

Usage: python -I image_process.py MAX_PIXELS < image > header line (JSON) and PNG. Exits with 2 and one line
on stderr when the image is refused. Imports nothing of ours: it must not hold settings or keys.
"""

import io
import json
import resource
import sys

FORMATS = {"PNG": b"\x89PNG\r\n\x1a\n", "JPEG": b"\xff\xd8\xff", "WEBP": b"RIFF"}
MEMORY = 2 * 2**30  # bytes of address space
CPU_SECONDS = 20
LONGEST = 2560  # pixels; twice the largest model's side, so a larger picture would gain nothing
SMALLEST = 16
RATIO = 8  # the longer side by the shorter


class RefusedError(Exception):
    """The image is not accepted; the text says what is."""


def limit() -> None:
    """Give this process little to do harm with: memory, time, and no files to write."""
    for kind, value in (
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_CPU, CPU_SECONDS),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (value, value))


def kind_of(data: bytes) -> str:
    """The format by its magic bytes; never by its name or declared type."""
    for name, magic in FORMATS.items():
        if data.startswith(magic) and (name != "WEBP" or data[8:12] == b"WEBP"):
            return name
    raise RefusedError("its first bytes are not those of a PNG, JPEG or WebP file")


def rewrite(data: bytes, max_pixels: int) -> tuple[int, int, bytes]:
    """Width, height and the PNG of the image's first frame: upright, RGB, without metadata."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    Image.MAX_IMAGE_PIXELS = None  # our own limit below answers with a sentence
    try:
        with Image.open(io.BytesIO(data), formats=[kind_of(data)]) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise RefusedError(f"it has {width}x{height} pixels; at most {max_pixels} are accepted")
            if min(width, height) < SMALLEST or max(width, height) > RATIO * min(width, height):
                raise RefusedError(f"it is {width}x{height}; each side needs {SMALLEST} pixels or more, "
                                   f"and one side at most {RATIO} times the other")  # fmt: skip
            image.load()
            upright = ImageOps.exif_transpose(image).convert("RGBA")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise RefusedError(f"it cannot be decoded ({type(error).__name__})") from None
    plain = Image.new("RGB", upright.size, "white")
    plain.paste(upright, mask=upright.getchannel("A"))
    plain.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    plain.save(out, "PNG", compress_level=3)
    return plain.width, plain.height, out.getvalue()


def write_image(data: bytes, max_pixels: int) -> None:
    """Write the header line and the PNG of an image to stdout. Raises RefusedError."""
    if not data:
        raise RefusedError("it is empty")
    width, height, png = rewrite(data, max_pixels)
    sys.stdout.buffer.write(json.dumps({"width": width, "height": height}).encode() + b"\n" + png)


def main() -> int:
    """Read stdin, write stdout."""
    limit()
    try:
        write_image(sys.stdin.buffer.read(), int(sys.argv[1]))
    except RefusedError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What becomes of an untrusted picture: upright, opaque, small enough; and what its process may not do."""

import io
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from api import image_process
from api.image_process import RefusedError, rewrite

PIXELS = 33_554_432


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def decoded(data: bytes) -> Image.Image:
    width, height, png = rewrite(data, PIXELS)
    with Image.open(io.BytesIO(png)) as image:
        image.load()
    assert (image.format, image.mode, image.size) == ("PNG", "RGB", (width, height))
    return image


def test_a_turned_photo_comes_out_upright() -> None:
    """EXIF orientation 6, as a telephone held upright writes it: the stored left edge is the top."""
    lying = Image.new("RGB", (64, 32), "blue")
    lying.paste("red", (0, 0, 32, 32))
    exif = Image.Exif()
    exif[0x0112] = 6
    image = decoded(encoded(lying, exif=exif))
    assert image.size == (32, 64)
    assert (image.getpixel((16, 8)), image.getpixel((16, 56))) == ((255, 0, 0), (0, 0, 255))
    assert not image.getexif()


def test_what_is_transparent_becomes_white() -> None:
    assert decoded(encoded(Image.new("RGBA", (16, 16), (255, 0, 0, 0)))).getpixel((8, 8)) == (255, 255, 255)


@pytest.mark.parametrize(("size", "smaller"), [((2561, 1280), (2560, 1280)), ((640, 5120), (320, 2560))])
def test_the_longer_side_has_at_most_2560_pixels(size: tuple[int, int], smaller: tuple[int, int]) -> None:
    found = decoded(encoded(Image.new("RGB", size))).size
    assert max(found) == 2560
    assert abs(found[0] - smaller[0]) + abs(found[1] - smaller[1]) <= 1


@pytest.mark.parametrize(
    ("size", "taken"), [((16, 16), True), ((16, 15), False), ((16, 128), True), ((16, 129), False)]
)
def test_the_smallest_and_the_narrowest(size: tuple[int, int], taken: bool) -> None:
    data = encoded(Image.new("RGB", size))
    if taken:
        assert decoded(data).size == size
    else:
        with pytest.raises(
            RefusedError, match="each side needs 16 pixels or more, and one side at most 8 times"
        ):
            rewrite(data, PIXELS)


def test_exactly_as_many_pixels_as_are_accepted() -> None:
    data = encoded(Image.new("RGB", (32, 32)))
    assert rewrite(data, 1024)[:2] == (32, 32)
    with pytest.raises(RefusedError, match="it has 32x32 pixels; at most 1023"):
        rewrite(data, 1023)


@pytest.mark.parametrize(
    "harm",
    [
        "bytearray(3 * 2**30)",
        "open('file', 'wb', 0).write(b'x')",
    ],
    ids=["memory", "files"],
)
def test_its_process_is_held_within_limits(harm: str, tmp_path: Path) -> None:
    """By the kernel, whatever a decoder is tricked into."""
    script = tmp_path / "harm.py"
    script.write_text(
        f"import runpy, resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"runpy.run_path({image_process.__file__!r})['limit']()\n{harm}\n"
    )
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(("MemoryError", "OSError"))

from pathlib import Path

import pytest
import torch
from PIL import Image

from engine.errors import RequestError
from engine.images import best_size, cover_and_crop, open_image, resize_bicubic, size_by_area, to_tensor


@pytest.mark.parametrize(
    ("image", "area", "expected"),
    [
        ((1920, 1080), 1280 * 720, (1280, 720)),
        # 4:3: sqrt(921600 * 3/4) = 831.4, 103 latents, 102 in whole patches, 816; sqrt(921600 * 4/3) =
        # 1108.5, 138 latents, 1104. So 51 x 69 tokens a frame, times 21 frames: 73,899, an odd number.
        ((1600, 1200), 1280 * 720, (1104, 816)),
        ((480, 832), 832 * 480, (480, 832)),
        ((10, 4000), 832 * 480, (16, 12624)),  # a sliver still has one token's width
    ],
)
def test_i2v_size_keeps_the_aspect_at_the_area(
    image: tuple[int, int], area: int, expected: tuple[int, int]
) -> None:
    assert size_by_area(image, area, 8, 2) == expected


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ((1920, 1080), (1248, 704)),  # 16:9, as the official code has it
        ((1280, 704), (1280, 704)),
        ((704, 1280), (704, 1280)),
        ((1000, 1000), (960, 928)),  # a tie: the height rounded first
    ],
)
def test_ti2v_size_is_the_nearer_of_two_candidates(image: tuple[int, int], expected: tuple[int, int]) -> None:
    size = best_size(image, 1280 * 704, 32)
    assert size == expected
    assert size[0] % 32 == size[1] % 32 == 0
    assert size[0] * size[1] <= 1280 * 704


def test_pixels_become_minus_one_to_one() -> None:
    image = Image.new("RGB", (2, 1), (0, 255, 51))
    assert to_tensor(image)[:, 0, 0].tolist() == pytest.approx([-1.0, 1.0, -0.6])


def test_resizing_and_cropping_give_the_size() -> None:
    image = Image.new("RGB", (50, 40), (200, 100, 0))
    for tensor in (resize_bicubic(image, (64, 32)), cover_and_crop(image, (64, 32))):
        assert tensor.shape == (3, 32, 64)
        assert torch.allclose(tensor, to_tensor(image)[:, :1, :1].expand(3, 32, 64), atol=1e-5)


def test_a_crop_is_from_the_centre() -> None:
    image = Image.new("RGB", (30, 10), (0, 0, 0))
    image.paste((255, 255, 255), (10, 0, 20, 10))
    assert (cover_and_crop(image, (10, 10)) > 0.99).all()


def test_a_tall_pictures_crop_is_from_its_middle() -> None:
    image = Image.new("RGB", (10, 30), (0, 0, 0))
    image.paste((255, 255, 255), (0, 10, 10, 20))
    assert (cover_and_crop(image, (10, 10)) > 0.99).all()


def test_pictures_are_made_smaller_by_the_official_filters(generator: torch.Generator) -> None:
    """I2V by torch's bicubic, which does not smooth; TI2V by Pillow's Lanczos, which does."""
    noise = torch.randint(256, (40, 50, 3), generator=generator, dtype=torch.uint8)
    image = Image.fromarray(noise.numpy())
    official = torch.nn.functional.interpolate(to_tensor(image)[None], size=(16, 20), mode="bicubic")[0]
    assert torch.equal(resize_bicubic(image, (20, 16)), official)
    lanczos = to_tensor(image.resize((25, 20), Image.Resampling.LANCZOS))
    assert torch.equal(cover_and_crop(image, (25, 20)), lanczos)


def test_what_is_no_picture_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    path.write_text("not a picture")
    with pytest.raises(RequestError, match=r"image.*a picture"):
        open_image(path)
    with pytest.raises(RequestError, match=r"gone\.png"):
        open_image(tmp_path / "gone.png")

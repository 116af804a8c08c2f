"""Input images: their way to the size and the tensor that each model wants.

Formulas: the official `wan/image2video.py` and `wan/textimage2video.py` (Wan-Video/Wan2.2, Apache-2.0).
"""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from engine.errors import RequestError

Size = tuple[int, int]  # width, height in pixels


def open_image(path: Path) -> Image.Image:
    """The picture in a file, as RGB. Raises RequestError."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise RequestError("image", str(path), f"a picture that can be opened ({error})") from error


def to_tensor(image: Image.Image) -> Tensor:
    """[3, H, W] fp32 in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)
    return pixels.float() / 255 * 2 - 1


def size_by_area(image: Size, area: int, stride: int, patch: int) -> Size:
    """I2V: the image's aspect at about `area` pixels, each side rounded down to whole patches of latents."""
    ratio = image[1] / image[0]
    cell = stride * patch
    height = round(math.sqrt(area * ratio) // stride // patch * patch) * stride
    width = round(math.sqrt(area / ratio) // stride // patch * patch) * stride
    return max(width, cell), max(height, cell)


def best_size(image: Size, area: int, cell: int) -> Size:
    """TI2V: multiples of `cell` within `area`, from rounding the width or the height down first.

    Of the two candidates the one whose ratio is nearer the image's.
    """
    ratio = image[0] / image[1]
    exact_width = math.sqrt(area * ratio)
    width = max(int(exact_width // cell * cell), cell)
    height = max(int(area / exact_width // cell * cell), cell)
    by_width = (width, max(int(area / width // cell * cell), cell))
    by_height = (max(int(area / height // cell * cell), cell), height)

    def distance(size: Size) -> float:
        got = size[0] / size[1]
        return max(ratio / got, got / ratio)

    return by_width if distance(by_width) < distance(by_height) else by_height


def resize_bicubic(image: Image.Image, size: Size) -> Tensor:
    """I2V: the whole image stretched to `size` as a tensor, bicubic, without a crop: [3, H, W]."""
    tensor = to_tensor(image)[None]
    return F.interpolate(tensor, size=(size[1], size[0]), mode="bicubic")[0]


def cover_and_crop(image: Image.Image, size: Size) -> Tensor:
    """TI2V: the image scaled (Lanczos) to cover `size`, cropped at its centre: [3, H, W]."""
    scale = max(size[0] / image.width, size[1] / image.height)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    left, top = (image.width - size[0]) // 2, (image.height - size[1]) // 2
    return to_tensor(image.crop((left, top, left + size[0], top + size[1])))

"""The Triton renderer draws what the plain one draws."""

import torch

from models.demo.train import fast_render
from models.demo.train.render import pack, render
from models.demo.train.world import sample_scenes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_kernel_equals_plain_renderer() -> None:
    """Every shape, texture and background, in a window and a span of its own for each clip."""
    packed = pack(sample_scenes(24, 5)).to(DEVICE)
    assert len(packed.shape.unique()) == 7
    assert len(packed.background.unique()) == 8
    rows = torch.arange(len(packed), device=DEVICE).flip(0)
    whole = render(packed, 5, 48, 64)
    drawn = fast_render.launch(
        packed, rows, torch.zeros(len(rows), 3, dtype=torch.long, device=DEVICE), (5, 48, 64), 5, 48, 64
    )
    # Hard edges of textures may fall on either side of a pixel's middle: few pixels, not the picture.
    assert ((drawn - whole[rows]).abs() > 2e-3).float().mean() < 1e-3
    corners = torch.tensor([[1, 8, 16], [2, 0, 32]], device=DEVICE)
    parts = fast_render.launch(packed, rows[:2], corners, (3, 40, 32), 5, 48, 64)
    for part, row, (first, top, left) in zip(parts, rows.tolist(), corners.tolist(), strict=False):
        expected = whole[row][:, first : first + 3, top : top + 40, left : left + 32]
        assert ((part - expected).abs() > 2e-3).float().mean() < 1e-3

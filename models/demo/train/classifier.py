"""The judge: a small network that reads colour, shape and motion off a clip. It sees only pixels.

Shapes: B clips, F frames, H rows, W columns.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.demo.train.common import load_weights
from models.demo.train.world import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, TEXTURES

CHECKPOINT = "classifier.safetensors"
FRAMES, SIDE = 9, 128  # what it looks at, whatever the clip's own
# Of the lone thing (trained where there is one): what it is. `background` and `count` are always trained.
HEADS = {
    "colour": len(COLOURS),
    "shape": len(SHAPES),
    "motion": len(MOTIONS),
    "texture": len(TEXTURES),
    "background": len(BACKGROUNDS),
    "count": 2,
}
# Of each colour: which shape of this colour is there and how it moves; 0 says that none is.
PAIR_HEADS = {
    "pair_shape": len(COLOURS) * (1 + len(SHAPES)),
    "pair_motion": len(COLOURS) * (1 + len(MOTIONS)),
}


class _Residual(nn.Module):
    def __init__(self, in_dim: int, out_dim: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(in_dim, out_dim, 3, stride, 1, bias=False)
        self.norm1 = nn.GroupNorm(8, out_dim)
        self.second = nn.Conv2d(out_dim, out_dim, 3, 1, 1, bias=False)
        self.norm2 = nn.GroupNorm(8, out_dim)
        self.skip = nn.Conv2d(in_dim, out_dim, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.norm1(self.first(x)))
        return F.silu(self.norm2(self.second(y)) + self.skip(x))


class Classifier(nn.Module):
    """Nine frames as channels of one picture, four halvings, linear heads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3 * FRAMES, 32, 5, 2, 2)
        self.body = nn.Sequential(
            _Residual(32, 48, 2), _Residual(48, 96, 2), _Residual(96, 96, 2), _Residual(96, 96, 1)
        )
        self.hidden = nn.Linear(192, 192)
        self.heads = nn.ModuleDict({name: nn.Linear(192, n) for name, n in (HEADS | PAIR_HEADS).items()})

    def forward(self, video_B3FHW: Tensor) -> dict[str, Tensor]:
        """Logits by head; pair heads as [B, colours, 1 + n]. Values in [-1, 1]."""
        x = self.body(F.silu(self.stem(look(video_B3FHW))))
        features = F.silu(self.hidden(torch.cat((x.mean((2, 3)), x.amax((2, 3))), dim=1)))
        logits = {name: head(features) for name, head in self.heads.items()}
        return logits | {name: logits[name].unflatten(1, (len(COLOURS), -1)) for name in PAIR_HEADS}


def look(video_B3FHW: Tensor) -> Tensor:
    """Nine evenly spaced frames at 128x128 as channels, [B, 27, 128, 128]."""
    frames = video_B3FHW.shape[2]
    if frames != FRAMES:
        picks = torch.linspace(0, frames - 1, FRAMES).round().long()
        video_B3FHW = video_B3FHW[:, :, picks.to(video_B3FHW.device)]
    x = video_B3FHW.flatten(1, 2)
    if x.shape[-2:] != (SIDE, SIDE):
        x = F.interpolate(x, (SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False)
    return x


def load_classifier(folder: Path, device: str = "cpu") -> Classifier:
    """The judge that ships with the model."""
    classifier = Classifier()
    load_weights(classifier, folder / CHECKPOINT)
    return classifier.to(device).eval()

"""How alike two clips are: PSNR, SSIM, and a distance in the features of the demo model's judge.

Clips are [3, T, H, W] in [-1, 1].
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.demo.train.classifier import Classifier, look

IDENTICAL_DB = 100.0  # what equal clips count as, so that means stay finite


def psnr_db(clip: Tensor, target: Tensor) -> float:
    """Peak signal to noise over all pixels and frames, dB; at most `IDENTICAL_DB`."""
    error = float(((clip - target) / 2).square().mean())
    return min(IDENTICAL_DB, -10 * float(torch.log10(torch.tensor(max(error, 1e-12)))))


def ssim(clip: Tensor, target: Tensor) -> float:
    """Mean structural similarity of frames and channels (Wang et al. 2004): Gaussian of 11, sigma 1.5."""
    grid = torch.arange(11, dtype=torch.float64) - 5  # variances are differences of squares
    line = torch.exp(-grid.square() / (2 * 1.5**2))
    window = torch.outer(line, line)[None, None] / line.sum() ** 2
    x, y = ((each.transpose(0, 1).flatten(0, 1)[:, None].double() + 1) / 2 for each in (clip, target))

    def blur(image: Tensor) -> Tensor:
        return F.conv2d(image, window)

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x.square(), blur(y * y) - mean_y.square()
    both = blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    score = (2 * mean_x * mean_y + c1) * (2 * both + c2)
    return float((score / ((mean_x.square() + mean_y.square() + c1) * (var_x + var_y + c2))).mean())


@torch.no_grad()
def feature_distance(judge: Classifier, clip: Tensor, target: Tensor) -> float:
    """Squared distance of unit-length features, mean over places, summed over the judge's stages.

    The form of LPIPS (arXiv:1801.03924) with every weight 1 and the features of a network that knows this
    world. It is comparable between clips of one judge and with nothing else.
    """
    x = look(torch.stack((clip, target)))
    total, stages = 0.0, [lambda x: F.silu(judge.stem(x)), *judge.body]
    for stage in stages:
        x = stage(x)
        unit = F.normalize(x, dim=1)
        total += float((unit[0] - unit[1]).square().sum(0).mean())
    return total

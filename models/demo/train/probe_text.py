"""What the frozen text encoder tells of a caption, slot by slot, to a linear reading of its output.

    python -m models.demo.train.probe_text [--out models/demo] [--captions 4000]

A linear layer a slot is fitted (ridge regression, in closed form) on captions of training's kind, from the
mean embedding of the caption's tokens, and read on held-out ones: apart for captions of one thing and of
two, since a word that can't be told apart here can't be drawn right by the experts either. Alain and
Bengio, "Understanding intermediate layers using linear classifier probes" (arXiv:1610.01644).
"""

import random

import torch
import torch.nn.functional as F
from torch import Tensor

from models.demo.train.captions import SLOTS, Caption, describe, held_out_prompts
from models.demo.train.common import SEED, arguments
from models.demo.train.train_text import embed, load_encoder, tokenize
from models.demo.train.world import sample_scenes

RIDGE = 1e-3  # of the features' mean square
JUDGED = ("shape_a", "colour_a", "motion_a", "shape_b", "colour_b", "motion_b")


def features(folder_encoder: tuple[torch.nn.Module, object], texts: list[str], device: str) -> Tensor:
    """[N, E + 1] fp32: the mean over a caption's tokens, and a one."""
    encoder, tokenizer = folder_encoder
    ids = tokenize(tokenizer, texts).to(device)  # type: ignore[arg-type]
    hidden = embed(encoder, ids).float()
    mean = hidden.sum(1) / (ids != 0).sum(1, keepdim=True)
    return F.pad(mean, (0, 1), value=1.0)


def fit(x_NE: Tensor, labels_N: Tensor, classes: int) -> Tensor:
    """Weights [E, classes] of the ridge regression onto one-hot labels."""
    gram = x_NE.T.double() @ x_NE.double()
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    wanted = F.one_hot(labels_N, classes).double()
    return torch.linalg.solve(gram, x_NE.T.double() @ wanted).float()


def labels_of(captions: list[Caption], device: str) -> Tensor:
    """[N, slots]."""
    return torch.tensor([list(caption.labels.values()) for caption in captions], device=device)


def main() -> None:
    """Fit, read, print a table."""
    parser = arguments(__doc__ or "", seconds=0)
    parser.add_argument("--captions", type=int, default=4000, help="to fit on")
    parser.add_argument("--count", type=int, default=2000, help="held-out captions to read")
    args = parser.parse_args()
    loaded = load_encoder(args.out, args.device)
    rng = random.Random(SEED)
    known = [describe(scene, rng, complete=True) for scene in sample_scenes(args.captions, SEED + 5_000)]
    pairs = held_out_prompts(args.count)
    unseen = [caption for _, caption in pairs]
    lone = torch.tensor([len(scene.things) == 1 for scene, _ in pairs], device=args.device)
    x, y = features(loaded, [c.text for c in known], args.device), labels_of(known, args.device)
    x_new, y_new = features(loaded, [c.text for c in unseen], args.device), labels_of(unseen, args.device)
    print(
        f"{len(known)} captions to fit on, {len(unseen)} held-out ones read ({int(lone.sum())} of one thing)"
    )
    print("| slot | one thing | two things |\n|---|---|---|")
    for column, (name, classes) in enumerate(SLOTS.items()):
        if name not in JUDGED:
            continue
        right = (x_new @ fit(x, y[:, column], classes)).argmax(1) == y_new[:, column]
        one, two = (right[rows].float().mean().item() for rows in (lone, ~lone))
        print(f"| {name} | {one:.1%} | {two:.1%} |" if name.endswith("_a") else f"| {name} | | {two:.1%} |")


if __name__ == "__main__":
    main()

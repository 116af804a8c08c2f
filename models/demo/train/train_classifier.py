"""Trains the judge of generated clips, on real (drawn) clips only.

    python -m models.demo.train.train_classifier

Blur, noise, contrast and offsets are laid over the drawn clips so that it bears a VAE's artefacts; no
generated or decoded clip is ever shown to it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.demo.train.classifier import CHECKPOINT, FRAMES, SIDE, Classifier
from models.demo.train.common import (
    SEED,
    Budget,
    Log,
    arguments,
    load_weights,
    prepare,
    save_weights,
    spread,
)
from models.demo.train.fast_render import draw, render
from models.demo.train.render import PackedScenes, pack
from models.demo.train.world import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, TEXTURES, Scene, sample_scenes

LONE = ("colour", "shape", "motion", "texture")


def labels_of(scenes: list[Scene]) -> dict[str, Tensor]:
    """What the heads should say."""
    rows: dict[str, list[object]] = {
        key: [] for key in (*LONE, "background", "count", "pair_shape", "pair_motion")
    }
    for scene in scenes:
        thing = scene.things[0]
        rows["colour"].append(COLOURS.index(thing.colour))
        rows["shape"].append(SHAPES.index(thing.shape))
        rows["motion"].append(MOTIONS.index(thing.motion))
        rows["texture"].append(TEXTURES.index(thing.texture))
        rows["background"].append(BACKGROUNDS.index(scene.background))
        rows["count"].append(len(scene.things) - 1)
        by_colour = {t.colour: t for t in scene.things}
        rows["pair_shape"].append(
            [1 + SHAPES.index(by_colour[c].shape) if c in by_colour else 0 for c in COLOURS]
        )
        rows["pair_motion"].append(
            [1 + MOTIONS.index(by_colour[c].motion) if c in by_colour else 0 for c in COLOURS]
        )
    return {key: torch.tensor(values) for key, values in rows.items()}


def scenes_and_labels(job: tuple[int, int]) -> tuple[PackedScenes, dict[str, Tensor]]:
    """Scenes of one seed with their labels. One in five is of the held-out combinations, other clips than
    those it is measured on: the judge must know every combination equally well."""
    count, seed = job
    scenes = sample_scenes(count - count // 5, seed) + sample_scenes(count // 5, seed, "held_out")
    return pack(scenes), labels_of(scenes)


def damage(video: Tensor) -> Tensor:
    """Random blur, noise, contrast and brightness, by clip."""
    b = len(video)
    some = 2 * b // 5  # which are at random already
    side = int(torch.randint(SIDE // 2, SIDE, ()).item())
    soft = F.interpolate(video[:some].flatten(1, 2).float(), (side, side), mode="bilinear", antialias=True)
    soft = F.interpolate(soft, (SIDE, SIDE), mode="bilinear").view(video[:some].shape)
    video = torch.cat((soft.to(video.dtype), video[some:]))

    def spread(size: float) -> Tensor:
        return (torch.rand(b, 1, 1, 1, 1, device=video.device, dtype=video.dtype) * 2 - 1) * size

    video = video * (1 + spread(0.1)) + spread(0.06)
    return video + torch.randn_like(video) * spread(0.12).abs()


def losses(logits: dict[str, Tensor], labels: dict[str, Tensor]) -> Tensor:
    """Cross-entropies: what only a lone thing has is asked only of lone things."""
    lone = (labels["count"] == 0).float()
    total = F.cross_entropy(logits["background"], labels["background"]) * 0.3
    total = total + F.cross_entropy(logits["count"], labels["count"])
    for name in LONE:
        each = F.cross_entropy(logits[name], labels[name], reduction="none")
        total = total + (each * lone).sum() / lone.sum().clamp_min(1)
    for name in ("pair_shape", "pair_motion"):
        total = total + 4 * F.cross_entropy(logits[name].flatten(0, 1), labels[name].flatten())
    return total


@torch.no_grad()
def accuracies(classifier: nn.Module, device: str, count: int) -> dict[str, float]:
    """Shares of right answers on held-out drawn clips."""
    scenes = sample_scenes(count, SEED + 1, "held_out")
    packed, labels = pack(scenes).to(device), labels_of(scenes)
    parts = [classifier(render(packed[i : i + 64])) for i in range(0, count, 64)]
    lone = labels["count"] == 0
    out = {}
    for name in parts[0]:
        right = torch.cat([part[name].argmax(-1) for part in parts]).cpu() == labels[name]
        if name in LONE:
            right = right[lone]
        elif name.startswith("pair"):
            right = right.all(1)[~lone]
        out[name] = float(right.float().mean())
    return out


def main() -> None:
    """Train, measure, save."""
    args = arguments(__doc__ or "", seconds=70).parse_args()
    tiny = args.max_steps < 1000
    jobs = [(25 if tiny else 4_000, SEED + 100 + i) for i in range(16)]
    parts = spread(scenes_and_labels, jobs)
    packed = PackedScenes.join([scenes for scenes, _ in parts]).to(args.device)
    labels = {key: torch.cat([some[key] for _, some in parts]).to(args.device) for key in parts[0][1]}
    prepare(args.device)
    classifier = Classifier()
    if args.resume:
        load_weights(classifier, args.out / CHECKPOINT)
    classifier = classifier.to(args.device, memory_format=torch.channels_last)
    on = args.device == "cuda"
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=1e-3, weight_decay=0.02, fused=on)
    budget = Budget(optimizer, args.lr or 2e-3, args.seconds, args.max_steps, until=args.until)
    log = Log("classifier", args.out, every=min(100, args.max_steps), resume=args.resume)
    for step in budget.steps():
        rows = torch.randint(len(packed), (args.batch or 128,), device=args.device)
        video = damage(draw(packed, rows, frame_num=FRAMES).to(torch.bfloat16 if on else torch.float32))
        with torch.autocast(args.device, torch.bfloat16, enabled=on):
            logits = classifier(video)
        loss = losses(
            {name: value.float() for name, value in logits.items()},
            {name: value[rows] for name, value in labels.items()},
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(classifier.parameters(), 1.0)
        optimizer.step()
        log.add(step, loss=loss)
    log.flush(step)
    save_weights(classifier, args.out / CHECKPOINT)
    classifier.eval()
    count = 32 if args.max_steps < 1000 else 1024
    right = accuracies(classifier, args.device, count)
    print("classifier on held-out drawn clips:", {k: round(v, 4) for k, v in right.items()}, flush=True)
    log.save(held_out_accuracy=right)


if __name__ == "__main__":
    main()

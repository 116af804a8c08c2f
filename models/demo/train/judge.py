"""Scores clips against the scenes that their captions came from, by the classifier's reading."""

from collections.abc import Iterable

import torch
from torch import Tensor

from models.demo.train.classifier import Classifier
from models.demo.train.train_classifier import labels_of
from models.demo.train.world import DIRECTIONS, Scene

Tally = dict[str, tuple[int, int]]  # right answers, questions


@torch.no_grad()
def judge(classifier: Classifier, video_B3FHW: Tensor, scenes: list[Scene]) -> Tally:
    """Right answers and questions by name, for clips in [-1, 1] of these scenes.

    colour, shape, motion, texture: of a lone thing. direction: a lone thing that travels; one of ten
    motions must be read right. two objects: both colours with their shapes, nothing else, in a clip of two;
    two objects' motion: both motions as well. all: colour, shape and motion of every thing.
    """
    truth = labels_of(scenes)
    read = {name: logits.argmax(-1).cpu() for name, logits in classifier(video_B3FHW).items()}
    right = {name: read[name] == truth[name] for name in read}
    lone = truth["count"] == 0
    travels = lone & (truth["motion"] < len(DIRECTIONS))
    pair = right["pair_shape"].all(1)
    pair_motion = pair & right["pair_motion"].all(1)
    every = torch.where(lone, right["colour"] & right["shape"] & right["motion"], pair_motion)
    asked = {
        "colour": (right["colour"], lone),
        "shape": (right["shape"], lone),
        "direction": (right["motion"], travels),
        "motion": (right["motion"], lone),
        "texture": (right["texture"], lone),
        "background": (right["background"], torch.ones_like(lone)),
        "two objects": (pair, ~lone),
        "two objects' motion": (pair_motion, ~lone),
        "all": (every, torch.ones_like(lone)),
    }
    return {name: (int((ok & of).sum()), int(of.sum())) for name, (ok, of) in asked.items()}


def add(tallies: Iterable[Tally]) -> Tally:
    """The sum of several tallies."""
    total: Tally = {}
    for tally in tallies:
        for name, (right, asked) in tally.items():
            before = total.get(name, (0, 0))
            total[name] = (before[0] + right, before[1] + asked)
    return total


def shares(tally: Tally) -> dict[str, float]:
    """Right answers over questions."""
    return {name: round(right / asked, 4) for name, (right, asked) in tally.items() if asked}

"""The synthetic world: what a clip may contain, how scenes are drawn at random, what is held out.

A scene is a frozen description with no pixels in it. `render.py` turns scenes into frames and
`captions.py` into sentences. Coordinates run over [-1, 1], x to the right and y *down* the frame;
time u runs over [0, 1] whatever the number of frames, so a speed is "per clip".
"""

import random
from dataclasses import dataclass
from typing import Literal

SHAPES = ("circle", "square", "triangle", "star", "heart", "ring", "cross")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")
TEXTURES = ("solid", "striped", "dotted", "checkered")
SIZES = ("small", "large")
MOTIONS = ("right", "left", "up", "down", "side_bounce", "bounce", "spin", "grow", "shrink", "still")
DIRECTIONS = MOTIONS[:4]
SPEEDS = ("slow", "fast")
EXTRAS = ("none", "spin", "grow", "shrink")  # what a thing does besides travelling
LAYOUTS = ("one", "beside", "stacked", "crossing")
BACKGROUNDS = ("day", "night", "grey", "cream", "black", "stripes", "checks", "dots")
PANS = ("none", "left", "right")
SCENIC = ("day", "night", "stripes", "checks", "dots")  # backgrounds on which a pan can be seen

Split = Literal["train", "held_out"]


@dataclass(frozen=True)
class Thing:
    """One object. Words come from the tuples above; x, y are the jitter of its place in [-1, 1]."""

    shape: str
    colour: str
    texture: str
    size: str
    motion: str
    speed: str
    extra: str
    jitter: tuple[float, float, float]  # x, y, phase


@dataclass(frozen=True)
class Scene:
    """One clip: things[0] is in front, or left, or above; `seed` fixes the background's details."""

    things: tuple[Thing, ...]
    layout: str
    background: str
    pan: str
    seed: int


def is_held_out(colour: str, shape: str, motion: str) -> bool:
    """Whether this combination is kept out of training.

    One combination in eleven, spread so that every pair of words still occurs in training.
    """
    code = 3 * COLOURS.index(colour) + 5 * SHAPES.index(shape) + 7 * MOTIONS.index(motion)
    return code % 11 == 0


def thing_is_held_out(thing: Thing) -> bool:
    """Whether the thing's (colour, shape, motion) is a held-out combination."""
    return is_held_out(thing.colour, thing.shape, thing.motion)


HELD_OUT = tuple(
    (colour, shape, motion)
    for colour in COLOURS
    for shape in SHAPES
    for motion in MOTIONS
    if is_held_out(colour, shape, motion)
)

# How often a lone thing moves in each way, and which motions fit each arrangement of two.
_MOTION_WEIGHTS = (15, 15, 15, 15, 8, 8, 8, 6, 6, 4)
_LAYOUT_MOTIONS = {
    "beside": ("up", "down", "bounce", "spin", "still"),
    "stacked": ("right", "left", "side_bounce", "spin", "still"),
}


def _texture(rng: random.Random) -> str:
    return rng.choices(TEXTURES, (58, 14, 14, 14))[0]


def spin_shows(shape: str, texture: str) -> bool:
    """A plain circle or ring looks the same however it turns."""
    return texture != "solid" or shape not in ("circle", "ring")


def _make_thing(rng: random.Random, motion: str, colour: str, shape: str, *, lone: bool) -> Thing:
    texture = _texture(rng)
    if motion == "spin" and not spin_shows(shape, texture):
        texture = rng.choice(TEXTURES[1:])
    extra = "none"
    if lone and motion in DIRECTIONS and rng.random() < 0.2:
        extra = rng.choice(EXTRAS[1:])
        if extra == "spin" and not spin_shows(shape, texture):
            extra = "none"
    jitter = (rng.uniform(-1, 1), rng.uniform(-1, 1), rng.uniform(-1, 1))
    return Thing(shape, colour, texture, rng.choice(SIZES), motion, rng.choice(SPEEDS), extra, jitter)


def _pick(
    rng: random.Random,
    split: Split,
    motions: tuple[str, ...],
    weights: tuple[int, ...] | None,
    not_colour: str | None = None,
) -> tuple[str, str, str]:
    """Draw a (colour, shape, motion) that belongs to the split."""
    while True:
        motion = rng.choices(motions, weights)[0]
        colour, shape = rng.choice(COLOURS), rng.choice(SHAPES)
        if colour != not_colour and is_held_out(colour, shape, motion) == (split == "held_out"):
            return colour, shape, motion


def sample_scene(rng: random.Random, split: Split = "train", *, layout: str | None = None) -> Scene:
    """Draw one scene.

    Training scenes hold no held-out combination; in a held-out scene every thing is one.
    """
    if layout is None:
        layout = rng.choices(LAYOUTS, (70, 10, 10, 10))[0]
    if layout == "one":
        colour, shape, motion = _pick(rng, split, MOTIONS, _MOTION_WEIGHTS)
        things: tuple[Thing, ...] = (_make_thing(rng, motion, colour, shape, lone=True),)
    else:
        first_ways = ("right", "left") if layout == "crossing" else _LAYOUT_MOTIONS[layout]
        colour, shape, motion = _pick(rng, split, first_ways, None)
        front = _make_thing(rng, motion, colour, shape, lone=False)
        ways = ({"right": "left", "left": "right"}[motion],) if layout == "crossing" else first_ways
        other_colour, other_shape, other_motion = _pick(rng, split, ways, None, not_colour=colour)
        things = (front, _make_thing(rng, other_motion, other_colour, other_shape, lone=False))
    background = rng.choices(BACKGROUNDS, (18, 18, 12, 12, 10, 10, 10, 10))[0]
    pan = rng.choice(PANS[1:]) if background in SCENIC and rng.random() < 0.25 else "none"
    return Scene(things, layout, background, pan, rng.getrandbits(20))


def sample_scenes(count: int, seed: int, split: Split = "train") -> list[Scene]:
    """Draw `count` scenes from one seed; the same seed gives the same scenes everywhere."""
    rng = random.Random(f"{split}-{seed}")
    return [sample_scene(rng, split) for _ in range(count)]

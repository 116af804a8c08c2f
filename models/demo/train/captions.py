"""Scenes to sentences: natural phrasing with synonyms, free word order and things left unsaid.

Every caption comes with labels: what the sentence says of each slot, for training the text encoder.
"""

import random
from dataclasses import dataclass

from models.demo.train import world
from models.demo.train.world import Scene, Thing

# What a caption may say, slot by slot. Label 0: not said. 1..n: the vocabulary. n + 1: no such thing.
THING_SLOTS = {
    "shape": world.SHAPES,
    "colour": world.COLOURS,
    "texture": world.TEXTURES,
    "size": world.SIZES,
    "motion": world.MOTIONS,
    "speed": world.SPEEDS,
    "extra": world.EXTRAS,
}
SCENE_SLOTS = {"layout": world.LAYOUTS, "background": world.BACKGROUNDS, "pan": world.PANS}
SLOTS: dict[str, int] = {
    **{f"{name}_{side}": len(words) + 2 for side in "ab" for name, words in THING_SLOTS.items()},
    **{name: len(words) + 2 for name, words in SCENE_SLOTS.items()},
}

NOUNS = {
    "circle": ("circle", "circle", "circle", "disc", "ball"),
    "square": ("square", "square", "square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "heart": ("heart",),
    "ring": ("ring", "ring", "ring", "hoop"),
    "cross": ("cross", "cross", "cross", "plus sign"),
}
COLOUR_WORDS = {"purple": ("purple", "purple", "violet")}
TEXTURE_WORDS = {
    "striped": ("striped",),
    "dotted": ("dotted", "spotted", "polka-dot"),
    "checkered": ("checkered", "checkered", "chequered"),
    "solid": ("plain", "solid"),
}
SIZE_WORDS = {"small": ("small", "small", "little", "tiny"), "large": ("large", "big", "huge")}
SPEED_WORDS = {
    "slow": ("slowly", "slowly", "gently"),
    "fast": ("quickly", "fast", "rapidly", "at high speed"),
}
TRAVEL = (
    ("moves", "moving"),
    ("slides", "sliding"),
    ("glides", "gliding"),
    ("drifts", "drifting"),
    ("flies", "flying"),
    ("travels", "travelling"),
)
COURSES = {
    "right": (
        "to the right",
        "to the right",
        "right",
        "rightwards",
        "from left to right",
        "towards the right",
        "across the screen from left to right",
    ),
    "left": (
        "to the left",
        "to the left",
        "left",
        "leftwards",
        "from right to left",
        "towards the left",
        "across the screen from right to left",
    ),
    "up": ("up", "upwards", "upwards", "from the bottom to the top", "towards the top"),
    "down": ("down", "downwards", "downwards", "from the top to the bottom", "towards the bottom"),
}
OWN_VERBS = {
    "up": (("rises", "rising"), ("climbs", "climbing")),
    "down": (("falls", "falling"), ("sinks", "sinking"), ("descends", "descending")),
}
IN_PLACE = {
    "side_bounce": (
        ("bounces from side to side", "bouncing from side to side"),
        ("bounces left and right", "bouncing left and right"),
        ("swings from side to side", "swinging from side to side"),
        ("moves back and forth", "moving back and forth"),
    ),
    "bounce": (
        ("bounces up and down", "bouncing up and down"),
        ("bounces", "bouncing"),
        ("hops up and down", "hopping up and down"),
        ("jumps up and down", "jumping up and down"),
    ),
    "spin": (
        ("spins", "spinning"),
        ("spins in place", "spinning in place"),
        ("rotates", "rotating"),
        ("turns around", "turning around"),
    ),
    "grow": (
        ("grows", "growing"),
        ("gets bigger", "getting bigger"),
        ("becomes larger", "becoming larger"),
        ("expands", "expanding"),
    ),
    "shrink": (
        ("shrinks", "shrinking"),
        ("gets smaller", "getting smaller"),
        ("becomes smaller", "becoming smaller"),
    ),
    "still": (
        ("stays still", "staying still"),
        ("stands still", "standing still"),
        ("rests", "resting"),
        ("does not move", "not moving"),
    ),
}
EXTRA_WORDS = {
    "spin": ("while spinning", "while rotating", "and spins"),
    "grow": ("while growing", "while getting bigger", "and grows"),
    "shrink": ("while shrinking", "while getting smaller", "and shrinks"),
}
PLACES = {
    "day": (
        "in the daytime",
        "during the day",
        "under a blue sky",
        "over a sunny meadow",
        "in a sunny day sky",
        "over a green field by day",
    ),
    "night": ("at night", "at night", "under a starry sky", "in the night sky", "under the stars"),
    "grey": ("on a plain grey background", "on a grey background", "in front of a plain gray wall"),
    "cream": ("on a plain cream background", "on a cream background", "in front of a beige wall"),
    "black": ("on a plain black background", "on a black background", "in front of a black wall"),
    "stripes": ("on a striped background", "in front of striped wallpaper", "over a striped backdrop"),
    "checks": ("on a checkered background", "over a checkerboard floor", "on a checkerboard background"),
    "dots": ("on a dotted background", "in front of polka-dot wallpaper", "over a dotted backdrop"),
}
CAMERA = {
    "left": ("the camera pans left", "the camera pans to the left", "the camera moves left"),
    "right": ("the camera pans right", "the camera pans to the right", "the camera moves right"),
}
WHERE = {"beside": ("on the left", "on the right"), "stacked": ("at the top", "at the bottom")}
OPENINGS = ("a video of", "a clip of", "a short video of", "an animation of")


@dataclass(frozen=True)
class Caption:
    """A sentence, and for each slot of SLOTS the label of what it says."""

    text: str
    labels: dict[str, int]


class _Writer:
    """Writes one caption, noting what it says."""

    def __init__(self, scene: Scene, rng: random.Random, complete: bool) -> None:
        self.scene = scene
        self.rng = rng
        self.complete = complete  # colour, shape, motion and layout are always said
        self.labels = dict.fromkeys(SLOTS, 0)
        if len(scene.things) == 1:
            for name, words in THING_SLOTS.items():
                self.labels[f"{name}_b"] = len(words) + 1

    def says(self, chance: float, essential: bool = False) -> bool:
        """Whether to say something that is said with this chance."""
        return (essential and self.complete) or self.rng.random() < chance

    def note(self, slot: str, side: str, word: str) -> None:
        """Record that the slot was said."""
        words = THING_SLOTS[slot] if side else SCENE_SLOTS[slot]
        self.labels[f"{slot}_{side}" if side else slot] = words.index(word) + 1

    def noun(self, thing: Thing, side: str) -> str:
        """'a small striped red star' with parts left out."""
        parts = []
        if self.says(0.5):
            parts.append(self.rng.choice(SIZE_WORDS[thing.size]))
            self.note("size", side, thing.size)
        look = []
        if self.says(0.12 if thing.texture == "solid" else 0.93):
            look.append(self.rng.choice(TEXTURE_WORDS[thing.texture]))
            self.note("texture", side, thing.texture)
        if self.says(0.94, essential=True):
            look.append(self.rng.choice(COLOUR_WORDS.get(thing.colour, (thing.colour,))))
            self.note("colour", side, thing.colour)
        self.rng.shuffle(look)
        parts += look
        if self.says(0.95, essential=True):
            parts.append(self.rng.choice(NOUNS[thing.shape]))
            self.note("shape", side, thing.shape)
        else:
            parts.append(self.rng.choice(("shape", "object", "thing")))
        phrase = " ".join(parts)
        return ("an " if phrase[0] in "aeiou" else "a ") + phrase

    def motion(self, thing: Thing, side: str, form: int) -> str:
        """What the thing does; form 0 'slides', 1 'sliding'. Empty where it is left unsaid."""
        if not self.says(0.95, essential=True):
            return ""
        self.note("motion", side, thing.motion)
        words = []
        if thing.motion in IN_PLACE:
            words.append(self.rng.choice(IN_PLACE[thing.motion])[form])
        elif thing.motion in OWN_VERBS and self.rng.random() < 0.35:
            words.append(self.rng.choice(OWN_VERBS[thing.motion])[form])
        else:
            words += [self.rng.choice(TRAVEL)[form], self.rng.choice(COURSES[thing.motion])]
        if thing.motion not in ("still", "grow", "shrink") and self.says(0.5):
            adverb = self.rng.choice(SPEED_WORDS[thing.speed])
            self.note("speed", side, thing.speed)
            words.insert(self.rng.choice((1, len(words))) if len(words) == 2 else len(words), adverb)
        if thing.extra != "none" and self.says(0.95):
            words.append(self.rng.choice(EXTRA_WORDS[thing.extra][: 3 - form]))
            self.note("extra", side, thing.extra)
        return " ".join(words)

    def place(self) -> str:
        """Where it happens; empty where it is left unsaid."""
        if not self.says(0.92):
            return ""
        self.note("background", "", self.scene.background)
        return self.rng.choice(PLACES[self.scene.background])

    def camera(self) -> str:
        """What the camera does; empty where it stands still."""
        if self.scene.pan == "none" or not self.says(0.95):
            return ""
        self.note("pan", "", self.scene.pan)
        return self.rng.choice(("while ", "as ")) + self.rng.choice(CAMERA[self.scene.pan])

    def one(self) -> str:
        """A sentence about a lone thing."""
        thing, rng = self.scene.things[0], self.rng
        style = rng.random()
        if style < 0.45:
            body = _join(self.noun(thing, "a"), self.motion(thing, "a", 0))
        elif style < 0.7:
            body = _join(self.noun(thing, "a"), self.motion(thing, "a", 1))
        elif style < 0.9:
            body = _join(rng.choice(OPENINGS), self.noun(thing, "a"), self.motion(thing, "a", 1))
        else:
            body = _join("there is", self.noun(thing, "a"))
            motion, place = self.motion(thing, "a", 0), self.place()
            return _join(body, place) + (f". it {motion}" if motion else "") + _tail(self.camera())
        return self.around(body)

    def around(self, body: str) -> str:
        """The body with place and camera before or after it."""
        place, camera = self.place(), self.camera()
        if place and self.rng.random() < 0.25:
            return f"{place}, {body}" + _tail(camera)
        return _join(body, place) + _tail(camera)

    def two(self) -> str:
        """A sentence about two things."""
        a, b = self.scene.things
        rng = self.rng
        layout = self.scene.layout
        self.note("layout", "", layout)
        if layout == "crossing":
            if rng.random() < 0.6:
                body = _join(
                    self.noun(a, "a"),
                    self.motion(a, "a", 1),
                    rng.choice(("passes in front of", "crosses in front of")),
                    self.noun(b, "b"),
                    self.motion(b, "b", 1),
                )
            else:
                body = _join(
                    self.noun(b, "b"),
                    self.motion(b, "b", 1),
                    rng.choice(("passes behind", "crosses behind")),
                    self.noun(a, "a"),
                    self.motion(a, "a", 1),
                )
            return self.around(body)
        first, second = WHERE[layout]
        sides = [(a, "a", first), (b, "b", second)]
        if rng.random() < 0.3:
            sides.reverse()
        style = rng.random()
        if style < 0.4:
            body = " and ".join(_join(self.noun(t, s), self.motion(t, s, 0), w) for t, s, w in sides)
        elif style < 0.75:
            body = ", ".join(_join(w, self.noun(t, s), self.motion(t, s, 0)) for t, s, w in sides)
        elif layout == "stacked":
            body = _join(
                self.noun(a, "a"), self.motion(a, "a", 1), "above", self.noun(b, "b"), self.motion(b, "b", 1)
            )
        else:
            body = _join(
                self.noun(a, "a"),
                self.motion(a, "a", 1),
                "to the left of",
                self.noun(b, "b"),
                self.motion(b, "b", 1),
            )
        return self.around(body)


def _join(*parts: str) -> str:
    return " ".join(part for part in parts if part)


def _tail(camera: str) -> str:
    return f", {camera}" if camera else ""


def describe(scene: Scene, rng: random.Random, *, complete: bool = False) -> Caption:
    """One sentence about the scene.

    `complete`: always name colour, shape and motion (held-out captions do, since they are judged on
    them); otherwise each is now and then left out, so that short prompts work too.
    """
    writer = _Writer(scene, rng, complete)
    if len(scene.things) == 1:
        writer.note("layout", "", "one")
        text = writer.one()
    else:
        text = writer.two()
    text = text[0].upper() + text[1:]
    text = text.replace(". it", ". It") + rng.choice((".", ""))
    return Caption(text, writer.labels)


def held_out_prompts(count: int, seed: int = 2026) -> list[tuple[Scene, Caption]]:
    """The captions that quality is measured on: combinations that training never saw."""
    scenes = world.sample_scenes(count, seed, "held_out")
    rng = random.Random(f"captions-{seed}")
    return [(scene, describe(scene, rng, complete=True)) for scene in scenes]


def known_prompts(count: int, seed: int = 2103) -> list[tuple[Scene, Caption]]:
    """Complete captions of training's kind: what settings are chosen by; held-out ones stay unseen."""
    rng = random.Random(f"captions-{seed}")
    return [(scene, describe(scene, rng, complete=True)) for scene in world.sample_scenes(count, seed)]

"""Quality presets as data: what is computed in 8 or 4 bits, what is reused, how many steps.

`lossless` is the default and always the computation that the other presets' loss is measured against. A
model offers another preset only where its reel.json says so, with what was calibrated for it:

    "presets": {
      "8bit": {"keep_blocks": [0, -1], "attention": true},
      "8bit-cache": {"step_threshold": 0.08, "guidance_threshold": 0.1, "max_reuse": 2},
      "4bit": {"keep_blocks": [0, -1], "first_steps": 2},
      "draft": {"steps": 4, "shift": 5.0, "loras": [{"name": "four-step-high", "expert": "high"}]}
    }

Each object may set any field of the preset's parts below. What a machine can't do, or an operator forbids,
stays in the list with the reason, so that a refusal can say it.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, TypeVar

from engine.errors import CheckpointError

LOSSLESS, EIGHT_BIT, CACHED, FOUR_BIT, DRAFT = "lossless", "8bit", "8bit-cache", "4bit", "draft"
NAMES = (LOSSLESS, EIGHT_BIT, CACHED, FOUR_BIT, DRAFT)
E4M3, NVFP4 = "e4m3", "nvfp4"  # number formats: `engine.number_format`
P = TypeVar("P")


@dataclass(frozen=True)
class EightBit:
    """Which blocks compute their six matrix products in e4m3. Embeddings, norms and the head never do."""

    form: ClassVar[str] = E4M3
    capability: ClassVar[tuple[int, int]] = (9, 0)  # of a GPU, at least
    family: ClassVar[str] = ""  # what GPUs of that capability are called

    keep_blocks: tuple[int, ...] = (0, -1)  # blocks that stay in the weights' dtype; -1 is the last
    first_steps: int = 0  # so many steps at the beginning are lossless: they decide what the video shows
    attention: bool = True  # self-attention: q k^T in int8, P V in e4m3

    def keeps(self, block: int, blocks: int) -> bool:
        """Whether block number `block` of `blocks` stays as it is."""
        return block in {kept % blocks for kept in self.keep_blocks if -blocks <= kept < blocks}


@dataclass(frozen=True)
class FourBit(EightBit):
    """The same in NVFP4, whose tensor cores no GPU before Blackwell has. Its native path was never run."""

    form: ClassVar[str] = NVFP4
    capability: ClassVar[tuple[int, int]] = (10, 0)
    family: ClassVar[str] = " (Blackwell)"

    attention: bool = False  # as `EightBit.attention`; plain unless asked for


@dataclass(frozen=True)
class Reuse:
    """When a step's work is reused instead of done. Thresholds are relative changes, 0 for never."""

    step_threshold: float = 0.0  # summed change of the modulated input since the last computed step
    attention_threshold: float = 0.0  # as step_threshold, since self-attention was last computed
    guidance_threshold: float = 0.0  # expected change of cond - uncond since it was last computed
    max_reuse: int = 2  # at most so many in a row
    first: int = 2  # steps at the beginning that are always computed
    last: int = 1  # and at the end


@dataclass(frozen=True)
class FewSteps:
    """A distilled schedule: these replace the model's defaults; guidance is 1, one forward a step."""

    steps: int = 4
    shift: float | None = None  # None: the model's own
    loras: tuple[Mapping[str, Any], ...] = ()  # name, strength, expert; all must be in the LoRA folder


@dataclass(frozen=True)
class Preset:
    """One preset of one model on one machine."""

    name: str
    summary: str
    eight_bit: EightBit | None = None
    reuse: Reuse | None = None
    few: FewSteps | None = None
    refused: str = ""  # why requests may not name it; "": they may


SUMMARIES = {
    LOSSLESS: "everything as the model was published, in bf16",
    EIGHT_BIT: "matrix products and self-attention of most blocks in 8 bits",
    CACHED: "8bit, and steps, self-attention or guidance that change little are reused",
    FOUR_BIT: "matrix products of most blocks in 4 bits (NVFP4; its Blackwell path was never run)",
    DRAFT: "few steps by distilled LoRAs, without guidance",
}
PARTS: Mapping[str, Mapping[str, type]] = {
    EIGHT_BIT: {"eight_bit": EightBit},
    CACHED: {"eight_bit": EightBit, "reuse": Reuse},
    FOUR_BIT: {"eight_bit": FourBit},
    DRAFT: {"few": FewSteps},
}
HELD = (EIGHT_BIT, CACHED)  # what a node that holds 8-bit weights alone may serve
ALONE = "this node holds 8-bit weights alone (--weights 8bit)"
ONLY_LOSSLESS = (Preset(LOSSLESS, SUMMARIES[LOSSLESS]),)


@dataclass(frozen=True)
class Machine:
    """What decides whether a preset can be served here."""

    cuda: tuple[int, int] | None = None  # compute capability; None: a CPU, where 8 and 4 bits are emulated
    loras: Collection[str] = ()  # in the LoRA folder
    forbidden: Collection[str] = field(default_factory=frozenset)  # by the operator
    emulate: bool = False  # offer 4 bits on GPUs without them too, emulated: to measure, not to serve
    only_eight: bool = False  # blocks in 8 bits are held in 8 bits alone: their published weights are gone


def offers(told: Mapping[str, Any], machine: Machine) -> tuple[Preset, ...]:
    """Every preset in the order of `NAMES`, refused ones with the reason.

    `told` is the `presets` object of a reel.json. Raises CheckpointError for what it can't mean.
    """
    if not isinstance(told, Mapping):
        raise CheckpointError(f"reel.json: presets is {told!r}, expected an object")
    unknown = sorted(set(told) - set(PARTS))
    if unknown:
        raise CheckpointError(f"reel.json: presets: unknown {unknown}; known: {', '.join(PARTS)}")
    found = [_preset(name, told) for name in NAMES]
    return tuple(replace(preset, refused=_reason(preset, told, machine)) for preset in found)


def find(presets: Sequence[Preset], name: str) -> Preset | None:
    """The preset of that name if requests may name it."""
    return next((p for p in presets or ONLY_LOSSLESS if p.name == name and not p.refused), None)


def allowed(presets: Sequence[Preset], name: str) -> str:
    """For an error's text: what may be asked for instead of `name`, and why not for `name`."""
    listed = ", ".join(p.name for p in presets or ONLY_LOSSLESS if not p.refused) or "none"
    reason = next((p.refused for p in presets if p.name == name), "")
    return f"{listed} ({name}: {reason})" if reason else listed


def held_blocks(presets: Sequence[Preset], blocks: int) -> frozenset[int]:
    """The blocks of `blocks` that every offered preset in `HELD` computes in 8 bits.

    A node that holds 8-bit weights alone has no others of them. CheckpointError where none is offered.
    """
    offered = [p.eight_bit for p in presets if p.name in HELD and p.eight_bit and not p.refused]
    if not offered:
        reasons = "; ".join(f"{p.name}: {p.refused}" for p in presets if p.name in HELD)
        raise CheckpointError(f"--weights 8bit leaves no preset that this node could serve ({reasons})")
    return frozenset(
        block for block in range(blocks) if not any(parts.keeps(block, blocks) for parts in offered)
    )


def _preset(name: str, told: Mapping[str, Any]) -> Preset:
    given = told.get(name, {})
    if not isinstance(given, Mapping):
        raise CheckpointError(f"reel.json: presets: {name} is {given!r}, expected an object")
    parts: dict[str, Any] = {}
    left = set(given)
    for part, kind in PARTS.get(name, {}).items():
        names = {f.name for f in fields(kind)}
        parts[part] = _filled(kind, name, {k: v for k, v in given.items() if k in names})
        left -= names
    if left:
        raise CheckpointError(f"reel.json: presets: {name} has unknown fields {sorted(left)}")
    return Preset(name, SUMMARIES[name], **parts)


def _filled(kind: type[P], name: str, given: Mapping[str, Any]) -> P:
    """A part with the given fields, each of its default's type and not below 0 where it is a number."""
    plain: Any = kind()
    values: dict[str, Any] = {}
    for key, value in given.items():
        default = getattr(plain, key)
        value = tuple(value) if isinstance(value, list) else value
        wanted = (int, float) if isinstance(default, float) or default is None else (type(default),)
        wrong = not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted)
        if wrong or (isinstance(value, (int, float)) and value < 0):
            raise CheckpointError(f"reel.json: presets: {name}: {key} is {value!r}, expected as {default!r}")
        values[key] = value
    return kind(**values)


def _emulated(parts: EightBit, machine: Machine) -> bool:
    """Whether a GPU without such tensor cores computes it all the same; e4m3's kernels have no such form."""
    return machine.emulate and parts.form == NVFP4


def _reason(preset: Preset, told: Mapping[str, Any], machine: Machine) -> str:
    """Why the preset can't be asked for; "" where it can."""
    if preset.name in machine.forbidden:
        return "forbidden by the operator"
    if machine.only_eight and preset.name not in HELD:
        return ALONE
    if preset.name == LOSSLESS:
        return ""
    if preset.name not in told:
        return "the model has no calibrated settings for it (presets in its reel.json)"
    parts = preset.eight_bit
    if parts and machine.cuda and machine.cuda < parts.capability and not _emulated(parts, machine):
        need, have = ("{}.{}".format(*each) for each in (parts.capability, machine.cuda))
        return f"needs a GPU of compute capability {need} or more{parts.family}; this one has {have}"
    if machine.only_eight and preset.eight_bit and preset.eight_bit.first_steps:
        return f"its first {preset.eight_bit.first_steps} steps are lossless, and {ALONE}"
    if preset.few is not None:
        names = [str(lora.get("name")) for lora in preset.few.loras]
        missing = [name for name in names if name not in machine.loras]
        if not names or missing:
            return f"needs distilled LoRAs in the model's LoRA folder: {', '.join(missing) or 'none named'}"
    return ""

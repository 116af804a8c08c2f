"""A client's video request against a model card: defaults filled in, every wrong field named at once."""

import math
import secrets
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictInt, ValidationError

from jobs.errors import FieldProblem, InvalidRequest
from jobs.job import GuidePair, Lora, ModelCard, VideoRequest
from jobs.quality import LOSSLESS, PresetCard, expected, find

PROMPT_MAX = 2000  # characters
SEED_MAX = 2**63 - 1
SEED_RANDOM = 2**53  # random seeds stay below: JavaScript would round a larger one
SHIFT_MIN = 0.01  # far below any in use; with the smallest numbers rounding leaves no schedule
NUMBER_MAX = 100.0  # of shift and guide_scale: far above any use, far below overflow
LORAS_MAX = 8  # in one request
GOT_MAX = 80  # characters of a wrong value that an error repeats

Number = Annotated[float, Field(strict=True)]


def _unicode(text: str) -> str:
    """JSON can carry half a surrogate pair, which is no character and can't be stored."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("text without lone surrogates") from None
    return text


Text = Annotated[str, AfterValidator(_unicode)]


class VideoRequestIn(BaseModel):
    """The video fields of a client's body; None (or absent) means the model's default.

    Types are checked here, unknown fields refused; ranges, which depend on the model, by `resolve`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: Annotated[Text, Field(description="What to show, 1 to 2000 characters.")]
    negative_prompt: Annotated[Text | None, Field(description="What to avoid; absent: the model's own.")] = (
        None
    )
    model: Annotated[Text | None, Field(description="A model's name; absent: the default model.")] = None
    size: Annotated[Text | None, Field(description="Width*height in pixels, one of the model's sizes.")] = (
        None
    )
    frame_num: Annotated[StrictInt | None, Field(description="Frames, 4n+1.")] = None
    shift: Annotated[Number | None, Field(description="Timestep shift, 0.01 to 100.")] = None
    sampling_steps: Annotated[StrictInt | None, Field(description="Denoising steps.")] = None
    guide_scale: Annotated[
        Number | tuple[Number, Number] | None,
        Field(description="Guidance: one number, or [low-noise, high-noise]."),
    ] = None
    seed: Annotated[StrictInt | None, Field(description="0 to 2^63-1; absent: random, and recorded.")] = None
    sample_solver: Annotated[Text | None, Field(description="unipc or dpm++.")] = None
    image: Annotated[Text | None, Field(description="To start from: an upload's id, or an https URL.")] = None
    loras: Annotated[
        tuple[Lora, ...] | None, Field(description="LoRAs of the model's folder, merged for this video.")
    ] = None
    quality: Annotated[
        Text | None, Field(description="A preset of the model's; absent: lossless.", examples=[LOSSLESS])
    ] = None


def resolve(body: VideoRequestIn, card: ModelCard) -> VideoRequest:
    """The request with every default of `card` filled in, and the seed chosen.

    Raises InvalidRequest with every field that is out of range.
    """
    fields = {name: getattr(body, name) for name in VideoRequestIn.model_fields}
    problems, filled = _check(fields, card)
    if problems:
        raise InvalidRequest(problems)
    return VideoRequest(**filled)


def parse_and_resolve(data: Mapping[str, Any], card: ModelCard) -> VideoRequest:
    """The same from a JSON object that holds only video fields: wrong types and wrong ranges in one error."""
    wrong: list[FieldProblem] = []
    try:
        VideoRequestIn.model_validate(dict(data))
    except ValidationError as error:
        wrong = problems_of(error)
    bad = {problem.field.split(".")[0] for problem in wrong}
    fields = {name: None if name in bad else data.get(name) for name in VideoRequestIn.model_fields}
    problems, filled = _check(fields, card, skip=bad)
    if wrong or problems:
        raise InvalidRequest(wrong + problems)
    return VideoRequest(**filled)


def problems_of(error: ValidationError) -> list[FieldProblem]:
    """Pydantic's complaints as field problems, one a field (a union reports each of its members)."""
    seen: dict[str, FieldProblem] = {}
    for item in error.errors(include_url=False):
        place = [str(part) for part in item["loc"]]
        if place and place[0] == "guide_scale":
            name, expected = "guide_scale", "a number, or a pair of numbers [low-noise, high-noise]"
        else:
            name = ".".join(place) or "body"
            expected = "no such field" if item["type"] == "extra_forbidden" else item["msg"]
        missing = item["type"] == "missing"
        got = "nothing" if missing else _short(item.get("input"))
        seen.setdefault(name, FieldProblem(name, got, "a value" if missing else expected))
    return list(seen.values())


class _Checks:
    """Collects problems while values are filled in."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self.fields = fields
        self.problems: list[FieldProblem] = []

    def value(self, name: str, default: Any, good: "Any", expected: str) -> Any:
        """The field or its default; a problem unless `good(value)`."""
        value = self.fields[name]
        if value is None:
            return default
        if not good(value):
            self.problems.append(FieldProblem(name, _short(value), expected))
        return value


def _check(
    fields: Mapping[str, Any], card: ModelCard, skip: frozenset[str] | set[str] = frozenset()
) -> tuple[list[FieldProblem], dict[str, Any]]:
    check = _Checks(fields)
    if fields["prompt"] is None and "prompt" not in skip:
        check.problems.append(FieldProblem("prompt", "nothing", f"1 to {PROMPT_MAX} characters"))
    quality = _quality(check, card)
    preset = find(card.presets, quality) or PresetCard(name=quality)  # a refused one changes no default
    filled = {
        "quality": quality,
        "prompt": check.value("prompt", "", _is_prompt, f"1 to {PROMPT_MAX} characters, not only spaces"),
        "negative_prompt": check.value(
            "negative_prompt", "", lambda v: len(v) <= PROMPT_MAX, f"at most {PROMPT_MAX} characters"
        ),
        "model": check.value("model", card.name, lambda v: v == card.name, f"{card.name!r}"),
        "size": check.value(
            "size", card.default_size, lambda v: v in card.sizes, "one of " + ", ".join(card.sizes)
        ),
        "frame_num": check.value(
            "frame_num",
            card.default_frame_num,
            lambda v: 1 <= v <= card.max_frame_num and v % 4 == 1,
            f"4n+1 from 1 to {card.max_frame_num}" + _nearest(fields["frame_num"], card.max_frame_num),
        ),
        "shift": check.value(
            "shift",
            preset.shift or card.default_shift,
            lambda v: SHIFT_MIN <= v <= NUMBER_MAX,
            f"{SHIFT_MIN:g} to {NUMBER_MAX:g}",
        ),
        "sampling_steps": check.value(
            "sampling_steps",
            preset.sampling_steps or card.default_sampling_steps,
            lambda v: 1 <= v <= card.max_sampling_steps,
            f"1 to {card.max_sampling_steps}",
        ),
        "guide_scale": _pair(
            check.value(
                "guide_scale",
                preset.guide_scale or card.default_guide_scale,
                lambda v: all(0 <= x <= NUMBER_MAX for x in _pair(v)),  # false for NaN, too
                f"finite numbers from 0 to {NUMBER_MAX:g}",
            )
        ),
        "seed": check.value(
            "seed", secrets.randbelow(SEED_RANDOM), lambda v: 0 <= v <= SEED_MAX, "0 to 2^63-1"
        ),
        "sample_solver": check.value(
            "sample_solver",
            card.sample_solvers[0],
            lambda v: v in card.sample_solvers,
            "one of " + ", ".join(card.sample_solvers),
        ),
        "image": _image(check, card, skip),
        "loras": _loras(check, card),
    }
    return check.problems, filled


def _image(check: _Checks, card: ModelCard, skip: frozenset[str] | set[str]) -> str | None:
    image: str | None = check.fields["image"]
    if card.task == "t2v" and image is not None:
        check.problems.append(
            FieldProblem("image", _short(image), f"none: {card.name} makes videos from text only")
        )
    if card.task == "i2v" and image is None and "image" not in skip:
        check.problems.append(FieldProblem("image", "nothing", f"an uploaded image: {card.name} needs one"))
    return image


def _quality(check: _Checks, card: ModelCard) -> str:
    asked: str | None = check.fields["quality"]
    quality = LOSSLESS if asked is None else asked
    if find(card.presets, quality) is None:
        default = " (the default)" if asked is None else ""
        check.problems.append(
            FieldProblem("quality", _short(quality) + default, expected(card.presets, quality))
        )
    return quality


def _loras(check: _Checks, card: ModelCard) -> tuple[Lora, ...]:
    given = check.fields["loras"] or ()
    loras = tuple(item if isinstance(item, Lora) else Lora.model_validate(item) for item in given)
    known = "one of " + ", ".join(card.loras) if card.loras else f"none: {card.name} has no LoRAs"
    if len(loras) > LORAS_MAX:
        check.problems.append(FieldProblem("loras", f"{len(loras)}", f"at most {LORAS_MAX}"))
    for place, lora in enumerate(loras[:LORAS_MAX]):
        if lora.name not in card.loras:
            check.problems.append(FieldProblem(f"loras.{place}.name", _short(lora.name), known))
    return loras


def _is_prompt(text: str) -> bool:
    return 1 <= len(text) <= PROMPT_MAX and bool(text.strip())


def _pair(value: float | tuple[float, float] | list[float]) -> GuidePair:
    if isinstance(value, (tuple, list)):
        return float(value[0]), float(value[1])
    return float(value), float(value)


def _nearest(frames: int | None, most: int) -> str:
    """The closest allowed counts, for the error's text."""
    if frames is None or not 1 <= frames <= most:
        return ""
    below = (frames - 1) // 4 * 4 + 1
    return f", such as {below}" + (f" or {below + 4}" if below + 4 <= most else "")


def _short(value: object) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    text = repr(value)
    size = len(value) if isinstance(value, str) else len(text)  # a text's own: repr adds quotes and escapes
    return text if len(text) <= GOT_MAX else f"{text[:GOT_MAX]}… ({size} characters)"

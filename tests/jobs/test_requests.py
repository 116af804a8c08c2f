"""Requests against a model card: defaults, every bound, every problem at once."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.errors import FieldProblem, InvalidRequest
from jobs.job import VideoRequest
from jobs.quality import PresetCard
from jobs.requests import SEED_MAX, VideoRequestIn, parse_and_resolve, resolve
from tests.support.jobs import card

CARD = card()
PLAIN = {"prompt": "a cat"}


def refused(data: dict[str, Any], **card_changes: Any) -> list[str]:
    with pytest.raises(InvalidRequest) as caught:
        parse_and_resolve(data, card(**card_changes))
    for problem in caught.value.problems:
        assert problem.got
        assert problem.expected
    return [problem.field for problem in caught.value.problems]


def test_defaults_come_from_the_card() -> None:
    request = resolve(VideoRequestIn(prompt="a cat"), CARD)
    assert request == VideoRequest(
        prompt="a cat",
        model="tiny",
        size="64*48",
        frame_num=5,
        shift=5.0,
        sampling_steps=4,
        guide_scale=(3.0, 4.0),
        seed=request.seed,
        sample_solver="unipc",
    )
    assert 0 <= request.seed <= SEED_MAX
    assert resolve(VideoRequestIn(prompt="a cat"), CARD).seed != request.seed


@pytest.mark.parametrize(
    "given_",
    [
        {"prompt": "x"},
        {"prompt": "x" * 2000},
        {"prompt": "日本語 🎬"},
        {"negative_prompt": ""},
        {"negative_prompt": "x" * 2000},
        {"model": "tiny"},
        {"size": "128*96"},
        {"frame_num": 1},
        {"frame_num": 81},
        {"shift": 0.01},
        {"shift": 100},
        {"sampling_steps": 1},
        {"sampling_steps": 100},
        {"guide_scale": 0},
        {"guide_scale": 7.5},
        {"guide_scale": [1, 100]},
        {"seed": 0},
        {"seed": SEED_MAX},
        {"sample_solver": "dpm++"},
        {"size": None, "seed": None},
    ],
)
def test_accepted(given_: dict[str, Any]) -> None:
    request = parse_and_resolve({**PLAIN, **given_}, CARD)
    for name, value in given_.items():
        if name == "guide_scale":
            pair = tuple(value) if isinstance(value, list) else (value, value)
            assert request.guide_scale == pair
        elif value is not None:
            assert getattr(request, name) == value


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("prompt", ["", "   \n", "x" * 2001, 7, None, ["a"], "a\ud800"]),
        ("negative_prompt", ["x" * 2001, 7]),
        ("model", ["", "other", 1]),
        ("size", ["", "64x48", "48*64", "64*48 ", 64, [64, 48]]),
        ("frame_num", [0, -3, 4, 6, 85, 10**30, 5.0, "5", True]),
        ("shift", [0, -1, 100.5, float("nan"), float("inf"), -float("inf"), "5", True, 10**400]),
        ("sampling_steps", [0, -1, 101, 4.0, "4", True, 10**30]),
        (
            "guide_scale",
            [-1, 101, float("nan"), [1], [1, 2, 3], [1, "2"], [], "3", {}, [1, float("inf")], True],
        ),
        ("seed", [-1, SEED_MAX + 1, 10**30, 1.0, "1", True]),
        ("sample_solver", ["", "euler", "UniPC", 1]),
        ("image", ["uploads/k/img_1.png", 5]),  # the card's task is t2v
        ("steps", [4]),
        ("Prompt", ["a"]),
    ],
)
def test_refused_naming_the_field(field: str, values: list[Any]) -> None:
    for value in values:
        assert refused({**PLAIN, field: value}) == [field], repr(value)


def test_every_problem_at_once() -> None:
    wrong = {
        "prompt": "",
        "size": "1*1",
        "frame_num": 6,
        "shift": "much",
        "sampling_steps": 0,
        "guide_scale": [1],
        "seed": -1,
        "sample_solver": "x",
        "colour": "red",
    }
    assert sorted(refused(wrong)) == sorted(wrong)
    assert refused({}) == ["prompt"]


def test_messages_say_what_is_allowed() -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_and_resolve({**PLAIN, "frame_num": 6, "size": "x" * 500}, CARD)
    by_field = {problem.field: problem for problem in caught.value.problems}
    assert by_field["frame_num"].expected == "4n+1 from 1 to 81, such as 5 or 9"
    assert by_field["frame_num"].got == "6"
    assert by_field["size"].expected == "one of 64*48, 128*96"
    assert len(by_field["size"].got) < 120


@pytest.mark.parametrize(
    ("task", "image", "good"),
    [
        ("t2v", False, True),
        ("t2v", True, False),
        ("i2v", True, True),
        ("i2v", False, False),
        ("ti2v", True, True),
        ("ti2v", False, True),
    ],
)
def test_images_by_task(task: str, image: bool, good: bool) -> None:
    data = {**PLAIN, **({"image": "uploads/k/img_1.png"} if image else {})}
    if good:
        assert parse_and_resolve(data, card(task=task)).image == data.get("image")
    else:
        assert refused(data, task=task) == ["image"]


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=5,
)
BODIES = st.dictionaries(st.sampled_from([*VideoRequestIn.model_fields, "other"]), ANY, max_size=6)


@settings(max_examples=100, deadline=None, print_blob=True)
@given(BODIES)
def test_any_json_is_accepted_or_refused_with_reasons(body: dict[str, Any]) -> None:
    problems: list[FieldProblem] = []
    try:
        request = parse_and_resolve(body, CARD)
    except InvalidRequest as error:
        problems = error.problems
    if problems:
        assert {problem.field.split(".")[0] for problem in problems} <= {*body, "prompt"}
    else:
        assert VideoRequest.model_validate_json(request.model_dump_json()) == request


def test_loras_are_the_cards() -> None:
    known = card(loras=["style", "four-step-low"])
    asked = [{"name": "style", "strength": 0.7}, {"name": "four-step-low", "expert": "low"}]
    request = parse_and_resolve(PLAIN | {"loras": asked}, known)
    assert [(x.name, x.strength, x.expert) for x in request.loras] == [
        ("style", 0.7, "both"),
        ("four-step-low", 1.0, "low"),
    ]
    assert parse_and_resolve(PLAIN, known).loras == ()
    assert resolve(VideoRequestIn(prompt="a", loras=request.loras), known).loras == request.loras


@pytest.mark.parametrize(
    ("loras", "field"),
    [
        ([{"name": "unknown"}], "loras.0.name"),
        ([{"name": "../style"}], "loras.0.name"),
        ([{"name": "style"}, {"name": "style", "strength": 11}], "loras.1.strength"),
        ([{"name": "style", "strength": "1"}], "loras.0.strength"),
        ([{"name": "style", "expert": "middle"}], "loras.0.expert"),
        ([{"name": "style", "path": "/etc"}], "loras.0.path"),
        ([{}], "loras.0.name"),
        ("style", "loras"),
        ([{"name": "style"}] * 9, "loras"),
    ],
)
def test_wrong_loras_are_named(loras: object, field: str) -> None:
    assert refused(PLAIN | {"loras": loras}, loras=["style"]) == [field]


def test_a_model_without_loras_says_so() -> None:
    with pytest.raises(InvalidRequest, match="tiny has no LoRAs"):
        parse_and_resolve(PLAIN | {"loras": [{"name": "style"}]}, CARD)


PRESETS = [
    PresetCard(name="lossless"),
    PresetCard(name="8bit", refused="needs a GPU"),
    PresetCard(name="draft", sampling_steps=2, shift=3.0, guide_scale=(1.0, 1.0)),
]


def test_a_preset_brings_its_defaults() -> None:
    known = card(presets=PRESETS)
    draft = parse_and_resolve(PLAIN | {"quality": "draft"}, known)
    assert (draft.quality, draft.sampling_steps, draft.shift, draft.guide_scale) == (
        "draft",
        2,
        3.0,
        (1.0, 1.0),
    )
    assert parse_and_resolve(PLAIN | {"quality": "draft", "sampling_steps": 3}, known).sampling_steps == 3
    plain = parse_and_resolve(PLAIN, known)
    assert (plain.quality, plain.sampling_steps) == ("lossless", 4)
    assert parse_and_resolve(PLAIN, card()).quality == "lossless"  # the card of an older node


@pytest.mark.parametrize(
    ("asked", "presets", "expected"),
    [
        ("8bit", PRESETS, "one of lossless, draft; 8bit: needs a GPU"),
        ("8bit", [], "one of lossless"),
        ("best", PRESETS, "one of lossless, draft"),
        ("", PRESETS, "one of lossless, draft"),
        (None, [PresetCard(name="lossless", refused="forbidden")], "one of none; lossless: forbidden"),
    ],
)
def test_a_preset_that_is_not_offered_is_refused_with_the_reason(
    asked: str | None, presets: list[PresetCard], expected: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_and_resolve(PLAIN | {"quality": asked}, card(presets=presets))
    assert [(p.field, p.expected) for p in caught.value.problems] == [("quality", expected)]

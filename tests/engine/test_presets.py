"""Which presets a model offers on a machine, and what a request under one becomes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.config import LoraUse
from engine.errors import CheckpointError, RequestError
from engine.load import load_pipeline
from engine.lora import distilled
from engine.pipeline import Pipeline
from engine.preset_memory import PASSES, preset_rows
from engine.presets import (
    CACHED,
    DRAFT,
    EIGHT_BIT,
    FOUR_BIT,
    LOSSLESS,
    NAMES,
    EightBit,
    FourBit,
    Machine,
    Preset,
    find,
    offers,
)
from engine.requests import check, resolve
from engine.tiny import make_tiny
from jobs.quality import QUALITIES
from tests.engine.loras import write_lora
from tests.engine.sinks import Frames
from worker.presets import preset_cards

TOLD = {
    "8bit": {"keep_blocks": [0, -1]},
    "8bit-cache": {"step_threshold": 0.1, "max_reuse": 3},
    "4bit": {"keep_blocks": [0], "first_steps": 2},
    "draft": {"steps": 2, "shift": 3, "loras": [{"name": "fast", "expert": "high"}]},
}


def reasons(told: dict, **machine: object) -> dict[str, str]:
    return {p.name: p.refused for p in offers(told, Machine(**machine))}  # type: ignore[arg-type]


def test_queue_and_engine_know_the_same_names() -> None:
    assert NAMES == QUALITIES


def test_a_model_that_says_nothing_is_lossless_alone() -> None:
    found = reasons({})
    assert found.pop(LOSSLESS) == ""
    assert all("reel.json" in reason for reason in found.values())


def test_what_a_model_says_is_offered_where_the_machine_can() -> None:
    assert set(reasons(TOLD, loras=["fast"]).values()) == {""}
    assert set(reasons(TOLD, loras=["fast"], cuda=(10, 0)).values()) == {""}
    hopper = reasons(TOLD, loras=["fast"], cuda=(9, 0))
    refusal = "needs a GPU of compute capability 10.0 or more (Blackwell); this one has 9.0"
    assert {name: reason for name, reason in hopper.items() if reason} == {FOUR_BIT: refusal}
    # Emulated there to be measured; e4m3 isn't, as its kernels need the GPU that it is native on.
    assert set(reasons(TOLD, loras=["fast"], cuda=(9, 0), emulate=True).values()) == {""}
    assert "9.0 or more" in reasons(TOLD, cuda=(8, 0), emulate=True)[EIGHT_BIT]
    old = reasons(TOLD, loras=["fast"], cuda=(8, 0))
    assert "9.0 or more; this one has 8.0" in old[EIGHT_BIT]
    assert old[EIGHT_BIT] == old[CACHED]
    assert (old[LOSSLESS], old[DRAFT]) == ("", "")
    assert "distilled LoRAs in the model's LoRA folder: fast" in reasons(TOLD)[DRAFT]
    assert "none named" in reasons({"draft": {}})[DRAFT]
    forbidden = reasons(TOLD, loras=["fast"], forbidden={LOSSLESS, CACHED, FOUR_BIT})
    assert {name for name, reason in forbidden.items() if reason == "forbidden by the operator"} == {
        LOSSLESS, CACHED, FOUR_BIT,
    }  # fmt: skip
    assert (forbidden[EIGHT_BIT], forbidden[DRAFT]) == ("", "")


def test_the_parts_are_what_reel_json_says() -> None:
    by_name = {p.name: p for p in offers(TOLD, Machine(loras=["fast"]))}
    assert by_name[EIGHT_BIT].eight_bit == EightBit((0, -1), 0, True)
    assert by_name[EIGHT_BIT].reuse is None
    assert by_name[FOUR_BIT].eight_bit == FourBit((0,), 2, False)
    cached = by_name[CACHED]
    assert cached.eight_bit == EightBit()
    assert cached.reuse is not None
    assert (cached.reuse.step_threshold, cached.reuse.guidance_threshold, cached.reuse.max_reuse) == (
        0.1,
        0,
        3,
    )
    assert distilled(by_name[DRAFT]) == (LoraUse("fast", 1.0, "high"),)


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"2bit": {}}, "unknown"),
        ({"4bit": {"form": "e4m3"}}, "unknown fields"),
        ({"8bit": 3}, "expected an object"),
        ({"8bit": {"step_threshold": 0.1}}, "unknown fields"),
        ({"8bit-cache": {"step_threshold": "much"}}, "step_threshold is 'much'"),
        ({"8bit-cache": {"max_reuse": -1}}, "max_reuse is -1"),
        ({"8bit": {"attention": 1}}, "attention is 1"),
        ({"draft": {"steps": True}}, "steps is True"),
        ([], "expected an object"),
    ],
)
def test_what_reel_json_cannot_mean_is_refused(told: dict, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        offers(told, Machine())


@pytest.mark.parametrize(("block", "kept"), [(0, True), (1, False), (4, False), (5, True)])
def test_kept_blocks(block: int, kept: bool) -> None:
    assert EightBit((0, -1)).keeps(block, 6) == kept
    assert not EightBit((6, 7, 10, -7, -8)).keeps(block, 6)  # there is no such block


def test_a_request_gets_the_presets_defaults(pipeline: Pipeline) -> None:
    spec = replace(pipeline.spec, presets=offers(TOLD, Machine(loras=["fast"])))
    draft = resolve(spec, "a cat", quality="draft")
    assert (draft.sampling_steps, draft.shift, draft.guide_scale) == (2, 3, (1.0, 1.0))
    assert resolve(spec, "a cat", quality="draft", sampling_steps=3).sampling_steps == 3
    plain = resolve(spec, "a cat")
    assert (plain.quality, plain.sampling_steps, plain.shift) == (LOSSLESS, 4, 5.0)
    with pytest.raises(RequestError, match=r"quality: got '8bit'; allowed: lossless \(8bit: the model has"):
        resolve(replace(spec, presets=offers({}, Machine())), "a cat", quality="8bit")
    with pytest.raises(RequestError, match="quality: got 'lossless'; allowed: 8bit"):
        check(plain, replace(spec, presets=offers(TOLD, Machine(forbidden={LOSSLESS}))))
    with pytest.raises(RequestError, match="allowed: lossless"):
        resolve(replace(spec, presets=()), "a cat", quality="8bit")


def test_cards_tell_what_the_model_offers(pipeline: Pipeline) -> None:
    cards = {c.name: c for c in preset_cards(replace(pipeline.spec, presets=offers(TOLD, Machine())))}
    assert list(cards) == list(NAMES)
    assert (cards["8bit"].refused, cards["8bit"].guide_scale) == ("", None)
    assert "distilled" in cards["draft"].refused
    assert (cards["draft"].sampling_steps, cards["draft"].guide_scale) == (2, (1.0, 1.0))
    assert [c.name for c in preset_cards(replace(pipeline.spec, presets=()))] == [LOSSLESS]


def test_draft_makes_its_few_steps_with_its_loras(tmp_path: Path) -> None:
    folder = make_tiny(tmp_path / "model", seed=1)
    told = json.loads((folder / "reel.json").read_text()) | {"presets": TOLD}
    (folder / "reel.json").write_text(json.dumps(told))
    write_lora(folder / "loras" / "fast.safetensors", load_pipeline(folder, device="cpu").high)
    pipeline = load_pipeline(folder, device="cpu", forbidden={"8bit-cache"})
    assert pipeline.loras is not None
    request = resolve(pipeline.spec, "a cat", quality="draft", frame_num=1, seed=1)
    work = pipeline.generate(request, Frames()).work
    assert pipeline.loras.merged is not None
    assert [use for use, _ in pipeline.loras.merged] == [LoraUse("fast", 1.0, "high")]
    assert (work.quality, work.steps_computed, work.steps_reused) == (DRAFT, 2, 0)
    pipeline.generate(resolve(pipeline.spec, "a cat", frame_num=1, seed=1), Frames())
    assert pipeline.loras.merged == ()
    with pytest.raises(RequestError, match="forbidden by the operator"):
        resolve(pipeline.spec, "a cat", quality="8bit-cache")
    assert find(pipeline.spec.presets, "8bit") == Preset("8bit", find_summary(pipeline), EightBit((0, -1)))


def find_summary(pipeline: Pipeline) -> str:
    return next(p.summary for p in pipeline.spec.presets if p.name == "8bit")


def test_the_memory_plan_knows_what_is_offered(pipeline: Pipeline) -> None:
    def rows(told: dict) -> dict[str, int]:
        spec = replace(pipeline.spec, presets=offers(told, Machine()))
        return dict(preset_rows(spec, 1000, 2, 1, torch.bfloat16))

    dim, ffn = pipeline.spec.dit.dim, pipeline.spec.dit.ffn_dim
    assert rows({}) == {}
    eight = 1000 * (ffn + dim) + 6 * dim * dim + 2 * dim * ffn
    assert rows({"8bit": {}}) == {"8-bit operands": eight}
    weights = (6 * dim * dim + 2 * dim * ffn) * 9 // 16 + 4 * (7 * dim + ffn)
    passes = {"4-bit operands and the passes that make them": PASSES * 1000 * ffn + weights}
    assert rows({"4bit": {}}) == passes
    assert rows({"8bit": {}, "4bit": {}}) == {"8-bit operands": eight} | passes
    residuals = 2 * 1000 * dim * 2
    assert rows({"8bit-cache": {}}) == {
        "residuals kept from step to step": residuals,
        "8-bit operands": eight,
    }

"""Self-attention taken from an earlier step: when, in which blocks, and that nothing of it stays behind."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from engine import fused
from engine.attention import WholeSequence, sdpa
from engine.cache import Decisions, StepCache, Texts
from engine.conditioning import Conditioning
from engine.dit import DiT
from engine.dit_block import Block, SelfAttention
from engine.eight_bit_mode import EightBitMode
from engine.errors import RequestError
from engine.ladder import plan_kept_attention
from engine.load import load_pipeline
from engine.memory import GIB, make_plan
from engine.parallel.mesh import Mesh
from engine.pipeline import Pipeline
from engine.preset_memory import kept_attention_bytes
from engine.presets import CACHED, ONLY_LOSSLESS, EightBit, Preset, Reuse
from engine.specs import T2V_A14B
from tests.engine.oracle import relative
from tests.engine.ranks import exact_eights
from tests.engine.test_cache import STEPS, run, with_rule
from tests.engine.test_memory import BF16, FP16, family

ALWAYS = Reuse(attention_threshold=1e9, max_reuse=2, first=1, last=1)
KEPT_NEVER_TAKEN = replace(ALWAYS, attention_threshold=1e-30)


def blocks(pipeline: Pipeline) -> list[Block]:
    experts = [expert for expert in (pipeline.high, pipeline.low) if expert is not None]
    return [block for expert in experts for block in expert.blocks if isinstance(block, Block)]


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[DiT, int]]:
    """(expert, how many of its blocks computed self-attention) of each forward."""
    found: list[tuple[DiT, int]] = []
    forward, attend = DiT.forward, SelfAttention.forward

    def counted_forward(self: DiT, *rest: object) -> object:
        found.append((self, 0))
        return forward(self, *rest)  # type: ignore[arg-type]

    def counted(self: SelfAttention, *rest: object) -> object:
        found[-1] = (found[-1][0], found[-1][1] + 1)
        return attend(self, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(DiT, "forward", counted_forward)
    monkeypatch.setattr(SelfAttention, "forward", counted)
    return found


def pattern(rule: Reuse, changes: list[float]) -> str:
    """c: computed whole, a: with kept self-attention, s: not at all."""
    decisions, found = Decisions(rule, len(changes)), ""
    for step, change in enumerate(changes):
        if decisions.reuse_step(step, change):
            found += "s"
        else:
            found += "a" if decisions.reuse_attention(step, there=True) else "c"
    return found


@pytest.mark.parametrize(
    ("rule", "changes", "expected"),
    [
        (Reuse(attention_threshold=0.25, first=1, last=1, max_reuse=9), [0, *[0.1] * 6], "caacaac"),
        (Reuse(attention_threshold=9, first=1, last=1, max_reuse=1), [0] * 6, "cacacc"),
        (Reuse(attention_threshold=9, first=3, last=2, max_reuse=9), [0] * 7, "cccaacc"),
        (Reuse(attention_threshold=0, first=1, last=1), [0] * 4, "cccc"),
        (Reuse(attention_threshold=1, first=1, last=1), [0, float("nan"), 0, 0, 0], "ccaac"),
        # Under both thresholds a step is reused whole; the cap counts what follows one another.
        (Reuse(0.15, attention_threshold=0.5, first=1, last=0, max_reuse=3), [0, *[0.1] * 7], "csascsas"),
        (Reuse(9, attention_threshold=9, first=1, last=0, max_reuse=2), [0] * 7, "csscssc"),
        # What a step with kept self-attention adds to the age of its own result: 1 of the 3, then 2 of the 4.
        (Reuse(0.15, attention_threshold=9, first=1, last=0, max_reuse=3), [0, 0.2, 0, 0, 0], "cassc"),
        (
            Reuse(0.15, attention_threshold=9, first=1, last=0, max_reuse=4),
            [0, 0.2, 0.2, *[0] * 4],
            "caasscs",
        ),
    ],
)
def test_a_step_takes_attention_by_the_sum_of_changes(
    rule: Reuse, changes: list[float], expected: str
) -> None:
    assert pattern(rule, changes) == expected


def test_an_expert_switch_or_a_pass_that_was_not_kept_computes() -> None:
    decisions = Decisions(ALWAYS, 20)

    def step(number: int, there: bool = True) -> bool:
        return not decisions.reuse_step(number, 0.0) and decisions.reuse_attention(number, there)

    assert [step(n) for n in range(3)] == [False, True, True]
    decisions.forget()
    assert [step(n) for n in (3, 4)] == [False, True]
    assert not step(5, there=False)
    assert step(6)


def test_exactly_the_allowed_steps_skip_attention(
    pipeline: Pipeline, computed: list[tuple[DiT, int]]
) -> None:
    video, work = run(with_rule(pipeline, ALWAYS))
    assert len(computed) == STEPS == work.steps_computed
    expected, last, age = [], None, 0
    for index, (expert, _) in enumerate(computed):
        age = age + 1 if expert is last and age < ALWAYS.max_reuse and index < STEPS - 1 else 0
        expected.append(0 if age else len(expert.blocks))
        last = expert
    assert [count for _, count in computed] == expected
    assert work.attention_reused == expected.count(0) >= 5
    assert {expert for expert, _ in computed} == {pipeline.high, pipeline.low}
    assert not np.array_equal(video, run(pipeline, "lossless")[0])


def test_what_is_kept_and_never_taken_changes_no_bit(pipeline: Pipeline) -> None:
    plain = run(pipeline, "lossless")[0]
    video, work = run(with_rule(pipeline, KEPT_NEVER_TAKEN))
    assert work.attention_reused == 0
    assert np.array_equal(video, plain)


def test_a_video_after_one_that_reused_or_failed_is_the_one_before(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    reusing = with_rule(pipeline, ALWAYS)
    before = run(reusing, "lossless")[0]
    first = run(reusing)[0]
    assert np.array_equal(run(reusing, "lossless")[0], before)
    assert np.array_equal(run(reusing)[0], first)
    with monkeypatch.context() as patch:
        patch.setattr(WholeSequence, "cross_attention", mock.Mock(side_effect=ArithmeticError))
        with pytest.raises(ArithmeticError):
            run(reusing)
    assert all(block.kept is None for block in blocks(pipeline))
    assert np.array_equal(run(reusing, "lossless")[0], before)


@pytest.mark.parametrize("in_turn", [False, True])
def test_passes_at_once_or_in_turn_are_the_same(pipeline: Pipeline, in_turn: bool) -> None:
    """Also where a step is without guidance, whose one pass takes its half of what both kept."""
    rule = replace(ALWAYS, guidance_threshold=1e9)
    reusing = with_rule(pipeline, rule)
    reusing.branches_in_turn = in_turn
    video, work = run(reusing)
    assert work.guidance_reused > 0
    assert work.attention_reused > 0
    other, other_work = run(with_rule(pipeline, rule))
    assert work == other_work
    assert np.abs(video.astype(float) - other).max() <= 1


def reused_latents(pipeline: Pipeline, rule: Reuse) -> Tensor:
    """Six steps from a guided expert into the other one, by whatever blocks are on."""
    generator = torch.Generator().manual_seed(4)
    text = torch.randn(2, 512, pipeline.spec.dit.text_dim, generator=generator)
    latents = torch.randn(16, 3, 6, 10, generator=generator)
    cache, image = StepCache(pipeline, rule, 6), Conditioning((0, 0))
    texts: Texts = {}
    with torch.inference_mode():
        for step, t in enumerate((900, 800, 700, 600, 500, 400)):
            expert = pipeline.high if step < 3 or pipeline.low is None else pipeline.low
            texts = {} if step == 3 else texts
            latents = latents - 0.1 * cache.flow(step, expert, 3.0, t, latents, text, texts, image)
    assert cache.attention_reused == (3 if rule.attention_threshold > 1 else 0)
    return latents


@pytest.fixture
def eights(pipeline: Pipeline) -> Iterator[Pipeline]:
    plain = pipeline.eight
    pipeline.eight = EightBitMode(pipeline, sdpa, sdpa, keep_weights=False)
    yield pipeline
    pipeline.eight = plain


@pytest.mark.parametrize("kind", ["fused", "8bit"])
def test_every_kind_of_block_takes_the_same(eights: Pipeline, kind: str) -> None:
    """Fused blocks, and blocks in 8 bits without their rounding, against plain ones."""
    expected = reused_latents(eights, ALWAYS)
    assert relative(expected, reused_latents(eights, Reuse())) > 1e-4
    on: AbstractContextManager[object] = nullcontext()
    on = mock.patch.object(fused, "applies", return_value=True) if kind == "fused" else exact_eights(eights)
    with on:
        assert relative(reused_latents(eights, ALWAYS), expected) < 1e-5
        plain = reused_latents(eights, Reuse())
        assert torch.equal(reused_latents(eights, KEPT_NEVER_TAKEN), plain)


def offering(threshold: float) -> tuple[Preset, ...]:
    """Lossless, and a preset that keeps self-attention from this threshold on."""
    return (*ONLY_LOSSLESS, Preset(CACHED, "", EightBit(), Reuse(attention_threshold=threshold)))


@pytest.mark.parametrize("layout", [(1, 8), (2, 4)])
def test_at_full_size_it_takes_7_gib_and_is_refused_where_they_are_not(layout: tuple[int, int]) -> None:
    spec, sizes = family(T2V_A14B)
    mesh = Mesh(0, *layout)
    tokens, branches = 75_600 // layout[1], 2 // layout[0]
    for threshold, expected in ((0.0, 0), (0.1, 40 * 2 * 9450 * 5120 * 2)):
        offered = replace(spec, presets=offering(threshold))
        assert kept_attention_bytes(offered, tokens, branches, BF16) == expected
    size = expected / GIB
    assert 7.2 < size < 7.3

    def planned(gib: float) -> tuple[Preset, float]:
        available = int(gib * GIB)
        plan = make_plan(
            offered, sizes, mesh, "resident", BF16, FP16,
            on_gpu=True, available=available, host_available=available,
        )  # fmt: skip
        told, plan = plan_kept_attention(offered, plan, mesh, BF16)
        return told.presets[-1], plan.gib

    without, with_it = planned(0), planned(10_000)
    assert with_it[1] - without[1] == pytest.approx(size)
    assert with_it[0].refused == ""
    assert planned(with_it[1] + 0.001) == with_it
    assert planned(with_it[1] - 0.001) == without
    assert "its attention cache takes 7.210 GiB of each GPU" in without[0].refused


def test_a_refusal_reaches_requests_and_spares_lossless(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.load.offers", lambda *_: offering(0.1))
    roomy = load_pipeline(tiny, device="cpu")
    assert run(roomy, CACHED)[1].quality == CACHED
    monkeypatch.setattr("engine.ladder.kept_attention_bytes", lambda *_: 2**60)
    full = load_pipeline(tiny, device="cpu")
    with pytest.raises(RequestError, match="attention cache takes"):
        run(full, CACHED)
    assert run(full, "lossless")[1].quality == "lossless"

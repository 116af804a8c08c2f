"""The caches: what is reused when, what never is, and that nothing changes where nothing is reused."""

from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from engine.cache import Decisions, StepCache, modulated_input, text_of
from engine.conditioning import Conditioning
from engine.config import Work
from engine.dit import DiT
from engine.parallel.mesh import Mesh
from engine.pipeline import Pipeline
from engine.presets import CACHED, ONLY_LOSSLESS, Preset, Reuse
from engine.requests import resolve
from kernels.attention.settled import Settled
from tests.engine.oracle import relative
from tests.engine.sinks import Frames

ALWAYS = Reuse(step_threshold=1e9, guidance_threshold=1e9, max_reuse=2, first=1, last=1)
STEPS = 12


def with_rule(pipeline: Pipeline, rule: Reuse) -> Pipeline:
    """The same pipeline with a preset that caches and does nothing else."""
    return Pipeline(
        replace(pipeline.spec, presets=(*ONLY_LOSSLESS, Preset(CACHED, "", reuse=rule))),
        pipeline.text_encoder, pipeline.high, pipeline.low, pipeline.vae, pipeline.mesh, pipeline.device,
    )  # fmt: skip


def run(
    pipeline: Pipeline, quality: str = CACHED, guide: tuple[float, ...] = (3.0, 4.0)
) -> tuple[np.ndarray, Work]:
    sink = Frames()
    request = resolve(
        pipeline.spec, "a cat", frame_num=5, sampling_steps=STEPS, shift=3.0, seed=3, guide_scale=guide,
        quality=quality,
    )  # fmt: skip
    work = pipeline.generate(request, sink).work
    return sink.video, work


def pattern(rule: Reuse, changes: list[float]) -> str:
    decisions = Decisions(rule, len(changes))
    return "".join("r" if decisions.reuse_step(step, x) else "c" for step, x in enumerate(changes))


@pytest.mark.parametrize(
    ("rule", "changes", "expected"),
    [
        (Reuse(step_threshold=0.3, first=1, last=1, max_reuse=9), [0, 0.1, 0.1, 0.1, 0.1, 0.1], "crrcrc"),
        (Reuse(step_threshold=9, first=1, last=1, max_reuse=1), [0, 0, 0, 0, 0, 0], "crcrcc"),
        (Reuse(step_threshold=9, first=3, last=2, max_reuse=9), [0, 0, 0, 0, 0, 0], "cccrcc"),
        (Reuse(step_threshold=0, first=1, last=1, max_reuse=9), [0, 0, 0, 0, 0, 0], "cccccc"),
        (Reuse(step_threshold=1, first=1, last=1, max_reuse=9), [0, float("nan"), 0, 0, 0, 0], "ccrrrc"),
        (Reuse(step_threshold=9, first=0, last=0, max_reuse=9), [0, 0, 0], "crr"),
    ],
)
def test_steps_are_reused_by_the_sum_of_changes(rule: Reuse, changes: list[float], expected: str) -> None:
    assert pattern(rule, changes) == expected


def test_guidance_is_reused_while_it_is_expected_to_move_little() -> None:
    decisions = Decisions(Reuse(guidance_threshold=0.25, first=1, last=1, max_reuse=9), 20)

    def step(number: int, moved: float | None = None) -> bool:
        decisions.reuse_step(number, 1.0)
        if decisions.reuse_guidance(number):
            return True
        decisions.guidance_moved(moved)
        return False

    assert not step(0)  # nothing is known
    assert not step(1, 0.1)  # 0.1 a step
    assert [step(n) for n in (2, 3)] == [True, True]  # 0.1 and 0.2 are under 0.25
    assert not step(4, 0.6)  # 0.3 is not; it moved by 0.6 in three steps
    assert step(5)  # 0.2
    assert not step(6, 0.9)
    assert not step(7, 0.1)
    assert step(8)
    decisions.forget()
    assert not step(9)


def test_guidance_is_reused_so_many_times_in_a_row_again_and_again() -> None:
    decisions = Decisions(Reuse(guidance_threshold=9, first=1, last=1, max_reuse=2), 10)
    found = ""
    for step in range(10):
        decisions.reuse_step(step, 1.0)
        reuse = decisions.reuse_guidance(step)
        found += "r" if reuse else "c"
        if not reuse:
            decisions.guidance_moved(0.1 if step else None)
    assert found == "ccrrcrrcrc"


def test_guidance_of_threshold_0_is_always_computed() -> None:
    """Also where it did not move at all, as that of a transformer that says nothing."""
    decisions = Decisions(Reuse(guidance_threshold=0.0, first=1, last=1), 9)
    for step in range(6):
        decisions.reuse_step(step, 1.0)
        assert not decisions.reuse_guidance(step)
        decisions.guidance_moved(None if step == 0 else 0.0)


class Scripted:
    """An expert whose every pass predicts what it is told of its rows: (conditional, unconditional)."""

    keeper = None

    def __init__(self, *told: tuple[float, float]) -> None:
        self.told, self.passes = list(told), list[tuple[int, ...]]()

    def encode_text(self, rows: torch.Tensor) -> list[tuple[int, ...]]:
        return [tuple(int(row) for row in rows[:, 0, 0])]

    def __call__(
        self, inputs: torch.Tensor, timesteps: torch.Tensor, text: Any, *rest: object
    ) -> torch.Tensor:
        self.passes.append(text[0])
        values = self.told.pop(0)
        return torch.tensor([values[row] for row in text[0]]).view(-1, 1, 1, 1, 1).expand(-1, 16, 1, 2, 2)


def test_a_change_is_relative_to_what_was(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """From 1 to 3 is a change of 2, not of 2/3."""
    seen = iter((1.0, 3.0, 9.0))
    monkeypatch.setattr("engine.cache.modulated_input", lambda expert, *rest: torch.full((4,), next(seen)))
    cache = StepCache(pipeline, Reuse(step_threshold=1.9, first=0, last=0), 3)
    expert, text, latents = Scripted((1.0, 1.0)), torch.zeros(1, 1, 1), torch.zeros(16, 1, 2, 2)
    expert.told *= 3
    for step in range(3):
        cache.flow(step, expert, 1.0, 500, latents, text, {}, Conditioning((16, 16)))  # type: ignore[arg-type]
    assert cache.steps_reused == 0


def test_what_guidance_was_stands_in_for_what_it_is(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cond + (guide - 1) * the last cond - uncond; and never one of another expert."""
    monkeypatch.setattr("engine.cache.modulated_input", lambda expert, *rest: torch.ones(1))
    cache = StepCache(pipeline, Reuse(guidance_threshold=1e9, max_reuse=9, first=1, last=1), 20)
    image, text = Conditioning((16, 16)), torch.tensor([0.0, 1.0]).view(2, 1, 1)
    latents = torch.zeros(16, 1, 2, 2)
    first = Scripted((5.0, 2.0), (6.0, 4.0), (7.0, 0.0))
    second = Scripted((1.0, 9.0), (3.0, 2.0), (4.0, 0.0))

    def flow(step: int, expert: Scripted) -> float:
        found = cache.flow(step, expert, 3.0, 500, latents, text, {}, image)  # type: ignore[arg-type]
        assert found.shape == latents.shape
        return float(found[0, 0, 0, 0])

    # uncond + 3 (cond - uncond), twice, so that it is known how guidance moves; then 7 + 2 (6 - 4)
    assert [flow(step, first) for step in range(3)] == [11.0, 10.0, 11.0]
    assert [flow(step, second) for step in range(3, 6)] == [-15.0, 5.0, 6.0]
    assert first.passes == second.passes == [(0, 1), (0, 1), (0,)]
    assert cache.guidance_reused == 2


def test_rank_0_decides_what_is_reused(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this rank would do by itself: here it would compute everything."""
    monkeypatch.setattr("engine.cache.modulated_input", lambda expert, *rest: torch.ones(1))
    # Of each step: the whole of it, and where it is computed its guidance and its self-attention.
    answers = [False, False, False, False, False, True, False, True, False, True]
    cache = StepCache(pipeline, Reuse(9, attention_threshold=9, guidance_threshold=9, first=99), 4)
    expert = mock.Mock(return_value=torch.zeros(2, 16, 1, 2, 2), blocks=[], keeper=None)
    expert.encode_text.return_value = []
    inputs = torch.zeros(16, 1, 2, 2), torch.zeros(2, 1, 1), {}, Conditioning((16, 16))
    found = []
    with mock.patch.object(Mesh, "agree", side_effect=answers) as agree:
        for step in range(4):
            if step == 2:
                expert.return_value = torch.zeros(1, 16, 1, 2, 2)
            cache.flow(step, expert, 3.0, 500, *inputs)
            found.append((cache.steps_reused, cache.guidance_reused, cache.attention_reused))
    assert agree.call_count == len(answers)
    assert not any(call.args[0] for call in agree.call_args_list)
    assert found == [(0, 0, 0), (0, 0, 1), (0, 1, 1), (1, 1, 1)]


def test_nothing_reused_is_the_lossless_video_to_the_bit(pipeline: Pipeline) -> None:
    cached = with_rule(pipeline, Reuse())
    video, work = run(cached)
    plain, plain_work = run(cached, "lossless")
    assert work == Work(CACHED, STEPS, 0, 0)
    assert plain_work == Work("lossless", STEPS)
    assert np.array_equal(video, plain)
    assert np.array_equal(run(pipeline, "lossless")[0], plain)


def test_forwards_are_as_few_as_the_record_says(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks: list[DiT] = []
    original = DiT.visit_blocks

    def counted(self: DiT, *, forward: bool) -> object:
        if forward:
            blocks.append(self)
        return original(self, forward=forward)

    monkeypatch.setattr(DiT, "visit_blocks", counted)
    video, work = run(with_rule(pipeline, ALWAYS))
    assert len(blocks) == work.steps_computed == STEPS - work.steps_reused
    assert work.steps_reused >= 4
    assert set(blocks) == {pipeline.high, pipeline.low}  # each switch computes anew
    assert not np.array_equal(video, run(pipeline, "lossless")[0])


def test_reuse_is_near_to_the_lossless_latents(pipeline: Pipeline) -> None:
    """A step whose input hardly changed gives nearly what computing it would have given."""
    plain = run(pipeline, "lossless")[0].astype(float)
    few = run(with_rule(pipeline, replace(ALWAYS, max_reuse=1, first=6)))[0].astype(float)
    many = run(with_rule(pipeline, replace(ALWAYS, max_reuse=4)))[0].astype(float)
    assert 0 < np.abs(few - plain).mean() < np.abs(many - plain).mean()


def test_guidance_alone(pipeline: Pipeline) -> None:
    rule = Reuse(guidance_threshold=1e9, max_reuse=1, first=2, last=1)
    video, work = run(with_rule(pipeline, rule))
    assert work.steps_computed == STEPS
    assert work.guidance_reused >= 2
    assert not np.array_equal(video, run(pipeline, "lossless")[0])


def test_guidance_1_reuses_steps_alone(pipeline: Pipeline) -> None:
    work = run(with_rule(pipeline, ALWAYS), guide=(1.0,))[1]
    assert work.steps_reused >= 4
    assert work.guidance_reused == 0


@pytest.mark.parametrize("in_turn", [False, True])
def test_branches_at_once_or_in_turn_are_the_same(pipeline: Pipeline, in_turn: bool) -> None:
    cached = with_rule(pipeline, ALWAYS)
    cached.branches_in_turn = in_turn
    video, work = run(cached)
    assert work == run(with_rule(pipeline, ALWAYS))[1]
    assert np.abs(video.astype(float) - run(with_rule(pipeline, ALWAYS))[0]).max() <= 1


def test_a_video_made_once_more_reuses_as_if_it_were_the_first(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where attention spoilt the latents, nothing of that try is reused, nor counted as work."""
    cached = with_rule(pipeline, ALWAYS)
    settled = Settled()
    monkeypatch.setattr("engine.pipeline.settled", settled)
    right, calls, spoilt_from = cached.sequence.attend, [0], [10**9]

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        return right(q, k, v) * (float("nan") if settled.ask() and calls[0] > spoilt_from[0] else 1.0)

    monkeypatch.setattr(cached.sequence, "attend", attend)
    want, want_work = run(cached)
    calls[0], spoilt_from[0] = 0, calls[0] // 2  # late, after steps that were reused
    video, work = run(cached)
    assert not settled.allowed, "the first try was to fail"
    assert work == want_work
    assert np.array_equal(video, want)


def test_texts_of_one_row_come_from_both(pipeline: Pipeline) -> None:
    text = torch.randn(2, 512, pipeline.spec.dit.text_dim, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        texts = {(0, 1): pipeline.high.encode_text(text)}
        for row in (0, 1):
            got, want = (
                text_of(pipeline.high, (row,), text, texts),
                pipeline.high.encode_text(text[row : row + 1]),
            )
            assert all(
                relative(a, b) < 1e-5
                for x, y in zip(got, want, strict=True)
                for a, b in zip(x, y, strict=True)
            )


def test_the_modulated_input_knows_latents_and_time(pipeline: Pipeline, generator: torch.Generator) -> None:
    expert = pipeline.high
    latents = torch.randn(1, 16, 3, 6, 8, generator=generator)
    with torch.inference_mode():
        base = modulated_input(expert, latents, torch.tensor([[500.0]]))
        assert base.shape == (1, 3 * 3 * 4, expert.config.dim)
        assert relative(modulated_input(expert, latents, torch.tensor([[400.0]])), base) > 1e-3
        assert relative(modulated_input(expert, latents * 1.5 + 0.1, torch.tensor([[500.0]])), base) > 1e-3
        two = modulated_input(expert, latents, torch.tensor([[0.0, 500.0]]))
        assert relative(two, base) < 1e-6


def test_of_many_tokens_some_from_everywhere_are_looked_at(
    pipeline: Pipeline, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.cache.PROBED", 4)
    latents = torch.randn(1, 16, 3, 6, 8, generator=generator)
    with torch.inference_mode():
        base = modulated_input(pipeline.high, latents, torch.tensor([[500.0]]))
        assert base.shape[1] == 4
        for frame in range(3):
            moved = latents.clone()
            moved[:, :, frame] += 1.0
            assert not torch.equal(modulated_input(pipeline.high, moved, torch.tensor([[500.0]])), base)

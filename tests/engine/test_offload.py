"""One expert in host memory: the same video to the bit, whatever happened before."""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.config import Canceled, LoraUse
from engine.layout import find_layout
from engine.load import load_pipeline
from engine.memory import sizes_of
from engine.offload import ExpertExchange, _block, _swap, _tensors
from engine.pinned import pinned_bytes
from engine.pipeline import Pipeline
from engine.presets import CACHED, ONLY_LOSSLESS, Preset, Reuse
from engine.requests import resolve
from tests.engine.loras import write_lora
from tests.engine.sinks import Frames


@pytest.fixture(scope="module")
def exchanging(tiny: Path, pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    folder = tmp_path_factory.mktemp("loras")
    write_lora(folder / "style.safetensors", pipeline.high)
    return load_pipeline(tiny, device="cpu", rung="host", loras=folder)


def video(pipeline: Pipeline, steps: int = 8, *loras: LoraUse, quality: str = "lossless") -> np.ndarray:
    """With 8 steps of shift 1 both experts work: t = 999 ... 124, boundary 875."""
    request = resolve(
        pipeline.spec,
        "a cat",
        frame_num=5,
        sampling_steps=steps,
        shift=1.0,
        seed=4,
        loras=loras,
        quality=quality,
    )
    sink = Frames()
    pipeline.generate(request, sink)
    return sink.video


@pytest.mark.parametrize("size", [1, 7, 64])
def test_tensors_larger_than_the_buffer_change_places_whole(generator: torch.Generator, size: int) -> None:
    """As a real block's do: the tiny ones of the other tests pass in one piece."""
    mine, theirs = torch.randn(2, 5, 3, generator=generator).unbind(0)
    before = mine.clone(), theirs.clone()
    _swap(mine, theirs, torch.empty(size, dtype=torch.uint8))
    assert torch.equal(mine, before[1])
    assert torch.equal(theirs, before[0])


def late(pipeline: Pipeline) -> int:
    assert pipeline.exchange is not None
    return pipeline.exchange.exchanged_late


def test_the_video_is_the_same_and_no_step_waits_for_a_block(
    pipeline: Pipeline, exchanging: Pipeline
) -> None:
    assert exchanging.branches_in_turn
    expected = video(one_by_one(pipeline))
    for _ in range(3):
        assert np.array_equal(video(exchanging), expected)
    assert late(exchanging) == 0  # every block was exchanged by the step before


def one_by_one(pipeline: Pipeline) -> Pipeline:
    """The resident pipeline with the branches in turn, as all lower rungs have them."""
    other = Pipeline(
        pipeline.spec, pipeline.text_encoder, pipeline.high, pipeline.low, pipeline.vae,
        pipeline.mesh, pipeline.device,
    )  # fmt: skip
    other.branches_in_turn = True
    return other


def test_only_one_experts_blocks_are_in_the_devices_places(exchanging: Pipeline) -> None:
    exchange = exchanging.exchange
    assert isinstance(exchange, ExpertExchange)
    here = {t.data_ptr() for block in exchange._here for t in block}
    video(exchanging)

    def placed(expert: torch.nn.Module) -> set[bool]:
        return {block.ffn[0].weight.data_ptr() in here for block in expert.blocks}  # type: ignore[attr-defined]

    assert exchanging.low is not None
    assert (placed(exchanging.high), placed(exchanging.low)) == ({True}, {False})  # ready for the next video


def test_a_cancel_between_the_experts_leaves_them_right(pipeline: Pipeline, exchanging: Pipeline) -> None:
    expected = video(one_by_one(pipeline))
    for after in (4, 5, 6):
        answers = iter([False] * after + [True] * 99)
        request = resolve(exchanging.spec, "a", frame_num=1, sampling_steps=8, shift=1.0)
        with pytest.raises(Canceled):
            exchanging.generate(request, Frames(), should_cancel=lambda answers=answers: next(answers))
        assert np.array_equal(video(exchanging), expected)


def test_a_failure_within_a_step_leaves_them_right(
    pipeline: Pipeline, exchanging: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = video(one_by_one(pipeline))
    original, calls = exchanging.sequence.cross_attention, 0

    def fail(*tensors: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 8:  # the second block of the second forward of the second (last high-noise) step
            raise torch.OutOfMemoryError("tried to allocate 7 GiB")
        return original(*tensors)

    with monkeypatch.context() as patch:
        patch.setattr(exchanging.sequence, "cross_attention", fail)
        with pytest.raises(Exception, match="7 GiB"):
            video(exchanging)
    assert calls == 8
    assert np.array_equal(video(exchanging), expected)


def test_where_the_step_before_reused_its_forwards_the_blocks_come_late_and_right(
    pipeline: Pipeline, exchanging: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = Reuse(step_threshold=1e9, guidance_threshold=1e9, max_reuse=2, first=1, last=1)
    spec = replace(exchanging.spec, presets=(*ONLY_LOSSLESS, Preset(CACHED, "", reuse=rule)))
    plain, before = one_by_one(pipeline), late(exchanging)
    with monkeypatch.context() as patch:
        patch.setattr(exchanging, "spec", spec)
        patch.setattr(plain, "spec", spec)
        assert np.array_equal(video(exchanging, 24, quality=CACHED), video(plain, 24, quality=CACHED))
    assert late(exchanging) > before  # a reused step made none leave
    assert np.array_equal(video(exchanging), video(plain))


def test_loras_come_and_go_on_both_sides(pipeline: Pipeline, exchanging: Pipeline) -> None:
    plain = video(exchanging)
    for expert in ("high", "low"):
        assert not np.array_equal(video(exchanging, 8, LoraUse("style", 1.0, expert)), plain)  # type: ignore[arg-type]
    assert np.array_equal(video(exchanging), plain)


def test_the_plan_knows_the_pinned_memory(tiny: Path, exchanging: Pipeline) -> None:
    assert exchanging.low is not None
    expert = exchanging.low
    block = [_tensors(_block(expert, index)) for index in range(len(expert.blocks))]
    layout = find_layout(tiny)
    assert layout.low is not None
    parts = ([layout.high.entries, layout.low.entries], layout.text.entries.values())
    sizes = sizes_of(*parts, layout.vae.entries.values(), torch.float32, torch.float32)
    assert sizes.pinned == pinned_bytes([[tensor.nbytes for tensor in each] for each in block])


def test_the_rung_is_named_in_the_log(tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        load_pipeline(tiny, device="cpu", rung="host")
    assert "one expert in pinned host memory, exchanged at the boundary" in caplog.text

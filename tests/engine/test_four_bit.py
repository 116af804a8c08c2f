"""The preset `4bit`: blocks in NVFP4, emulated here; its native path for Blackwell was never run."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.attention import Overlap
from engine.config import DiTConfig
from engine.eight_bit_mode import kept_bytes
from engine.load import load_pipeline
from engine.number_format import FORMATS
from engine.pipeline import Pipeline
from engine.presets import EIGHT_BIT, FOUR_BIT, NVFP4, ONLY_LOSSLESS, EightBit, FourBit, Preset
from engine.requests import resolve
from kernels import attention_8bit, nvfp4_gemm
from tests.engine.oracle import relative
from tests.engine.ranks import FUSED_GRID, case_latents
from tests.engine.sinks import Frames

ALL = FourBit(keep_blocks=())


@pytest.fixture
def four(tiny: Path) -> Pipeline:
    """The tiny model, offering `8bit` and `4bit` with every block in them."""
    pipeline = load_pipeline(tiny, device="cpu")
    presets = (*ONLY_LOSSLESS, Preset(EIGHT_BIT, "", EightBit(())), Preset(FOUR_BIT, "", ALL))
    pipeline.spec = replace(pipeline.spec, presets=presets)
    return pipeline


def video(pipeline: Pipeline, quality: str) -> np.ndarray:
    sink = Frames()
    request = resolve(pipeline.spec, "a cat", frame_num=5, sampling_steps=2, seed=3, quality=quality)
    assert pipeline.generate(request, sink).work.quality == quality
    return sink.video.astype(float)


def latents(pipeline: Pipeline, parts: EightBit) -> Tensor:
    with pipeline.eight.using(Preset("any", "", parts)):
        return case_latents(pipeline, FUSED_GRID)


def test_lossless_before_and_after_are_one(four: Pipeline) -> None:
    before = video(four, "lossless")
    eight, rounded = video(four, EIGHT_BIT), video(four, FOUR_BIT)
    assert 0 < np.abs(rounded - before).mean() < 40
    assert np.abs(rounded - before).mean() > np.abs(eight - before).mean()
    assert np.array_equal(video(four, "lossless"), before)
    # Kept weights change nothing but the work, and neither format takes the other's.
    four.eight.keep(2**40, four.spec.dit)
    assert [len(blocks._weights) for blocks in (four.eight.blocks, four.eight.fours)] == [4, 4]
    assert np.array_equal(video(four, FOUR_BIT), rounded)
    assert np.array_equal(video(four, EIGHT_BIT), eight)
    blocks = [*four.high.blocks, *four.low.blocks]  # type: ignore[union-attr]
    assert all(block.eight is None for block in blocks)


def test_four_bits_are_coarser_than_eight(four: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = case_latents(four, FUSED_GRID)
    eight = relative(latents(four, EightBit((), attention=False)), plain)
    with_attention = relative(latents(four, replace(ALL, attention=True)), plain)
    monkeypatch.setattr(attention_8bit, "attention", None)  # by default it isn't used
    coarse, one = relative(latents(four, ALL), plain), relative(latents(four, FourBit((0,))), plain)
    print(f"relative error of the latents: 8 bits {eight:.3g}, 4 bits {coarse:.3g}, one block {one:.3g}")
    assert 2 * eight < coarse < 0.5
    assert 0 < one < coarse * 1.2
    assert with_attention not in (coarse, 0)
    assert torch.equal(latents(four, FourBit((0, 1))), plain)
    assert torch.equal(latents(four, FourBit((), first_steps=3)), plain)


def test_other_tokens_and_passes_change_no_numbers(four: Pipeline) -> None:
    """q, k and v one after another, and each guidance pass by itself: a token's scales are its own."""
    whole = latents(four, ALL)
    four.eight.sequence.overlap = Overlap()  # type: ignore[misc]
    assert relative(latents(four, ALL), whole) < 1e-3


def test_weights_are_kept_as_far_as_there_is_room(four: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    config, mode = four.spec.dit, four.eight
    eight, coarse = 2 * kept_bytes(config), 2 * kept_bytes(config, FORMATS[NVFP4])
    assert coarse < 0.62 * eight
    for room, kept in {
        0: (False, False),
        coarse + 1: (False, True),
        eight + coarse: (True, False),
        eight + coarse + 1: (True, True),
    }.items():
        mode.keep(room, config)
        assert (mode.blocks.keep_weights, mode.fours.keep_weights) == kept
    made: list[int] = []
    monkeypatch.setattr(nvfp4_gemm, "quantize_weight", made.append)
    latents(four, ALL)
    assert made == []


def test_kept_bytes_are_those_of_a_model() -> None:
    a14b = DiTConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
    assert 6 < kept_bytes(a14b, FORMATS[NVFP4]) / 2**30 < 7  # of an expert whose blocks take 23 GiB in bf16

"""Blocks in 8 bits: near the others where they round, the same formulas where they don't, gone afterwards."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.attention import Attend, sdpa
from engine.config import DiTConfig, LoraUse
from engine.eight_bit import EightBitBlocks, Weights
from engine.eight_bit_mode import EightBitMode, kept_bytes
from engine.load import load_pipeline
from engine.number_format import FORMATS
from engine.pipeline import Pipeline
from engine.presets import EIGHT_BIT, ONLY_LOSSLESS, EightBit, Preset
from engine.requests import resolve
from engine.warmup import warm_up
from kernels import attention_8bit, fp8_gemm
from tests.engine.loras import write_lora
from tests.engine.oracle import relative
from tests.engine.ranks import FUSED_GRID, case_latents, exact_eights, fused_latents
from tests.engine.sinks import Frames

ALL = EightBit(keep_blocks=())


@pytest.fixture
def eight(tiny: Path, tmp_path: Path) -> Pipeline:
    """The tiny model, offering `8bit` with every block in 8 bits, and a LoRA."""
    pipeline = load_pipeline(tiny, device="cpu", loras=tmp_path)
    write_lora(tmp_path / "style.safetensors", pipeline.high)
    presets = (*ONLY_LOSSLESS, Preset(EIGHT_BIT, "", ALL))
    pipeline.spec = replace(pipeline.spec, presets=presets)
    return pipeline


def video(pipeline: Pipeline, quality: str, *loras: LoraUse) -> np.ndarray:
    sink = Frames()
    request = resolve(
        pipeline.spec, "a cat", frame_num=5, sampling_steps=3, seed=3, quality=quality, loras=loras
    )
    assert pipeline.generate(request, sink).work.quality == quality
    return sink.video.astype(float)


def latents(pipeline: Pipeline, parts: EightBit) -> Tensor:
    with pipeline.eight.using(Preset(EIGHT_BIT, "", parts)):
        return case_latents(pipeline, FUSED_GRID)


def test_without_rounding_it_is_the_same_computation(eight: Pipeline) -> None:
    with exact_eights(eight):
        got = case_latents(eight, FUSED_GRID)
    assert relative(got, case_latents(eight, FUSED_GRID)) < 1e-5


def test_with_rounding_it_is_near(eight: Pipeline) -> None:
    plain = case_latents(eight, FUSED_GRID)
    products = relative(latents(eight, EightBit((), attention=False)), plain)
    both = relative(latents(eight, ALL), plain)
    print(f"relative error of the latents: products {products:.3g}, with attention {both:.3g}")
    assert 1e-3 < products < 0.2
    assert 1e-3 < both < 0.2
    assert both != products


def test_kept_blocks_are_not_touched(eight: Pipeline) -> None:
    assert torch.equal(latents(eight, EightBit((0, 1))), case_latents(eight, FUSED_GRID))
    first = relative(latents(eight, EightBit((1,))), fused_latents(eight))
    assert 1e-4 < first < relative(latents(eight, ALL), fused_latents(eight)) * 1.5


def test_a_kept_blocks_attention_is_not_in_8_bits(eight: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def told(name: str) -> Attend:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            calls.append(name)
            return sdpa(q, k, v)

        return attend

    monkeypatch.setattr(attention_8bit, "attention", told("8bit"))
    eight.eight = EightBitMode(eight, told("plain"), sdpa, keep_weights=False)
    latents(eight, EightBit((1,)))
    assert calls == ["8bit", "plain"] * 3  # of three steps


def test_first_steps_are_lossless(eight: Pipeline) -> None:
    plain = case_latents(eight, FUSED_GRID)  # three steps
    assert torch.equal(latents(eight, EightBit((), first_steps=3)), plain)
    errors = [relative(latents(eight, EightBit((), first_steps=steps)), plain) for steps in (2, 0)]
    assert 0 < errors[0] < errors[1]


def test_lossless_before_and_after_are_one(eight: Pipeline) -> None:
    before = video(eight, "lossless")
    rounded = video(eight, EIGHT_BIT)
    assert 0 < np.abs(rounded - before).mean() < 20
    assert np.array_equal(video(eight, EIGHT_BIT), rounded)
    assert np.array_equal(video(eight, "lossless"), before)
    blocks = [*eight.high.blocks, *eight.low.blocks]  # type: ignore[union-attr]
    assert all(block.eight is None for block in blocks)


def test_a_failing_video_leaves_nothing_behind(eight: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    before = video(eight, "lossless")

    def broken(*_: object) -> None:
        raise ArithmeticError("in the midst")

    monkeypatch.setattr(fp8_gemm, "gelu_quantize", broken)
    with pytest.raises(ArithmeticError):
        video(eight, EIGHT_BIT)
    assert np.array_equal(video(eight, "lossless"), before)


def test_kept_weights_change_nothing_but_the_work(eight: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = eight.eight.blocks
    eight.eight.keep(0, eight.spec.dit)
    assert not blocks.keep_weights
    made = video(eight, EIGHT_BIT)
    eight.eight.keep(10 * 2 * kept_bytes(eight.spec.dit), eight.spec.dit)
    assert blocks.keep_weights
    assert len(blocks._weights) == 4  # two blocks of each expert, made while loading
    calls: list[int] = []
    original = fp8_gemm.quantize_rows

    def counted(x: Tensor) -> fp8_gemm.Rows:
        calls.append(x.shape[0])
        return original(x)

    monkeypatch.setattr(fp8_gemm, "quantize_rows", counted)
    assert np.array_equal(video(eight, EIGHT_BIT), made)
    assert set(calls) <= {1, 2}  # activations: no weight is quantised again


def test_what_is_refused_takes_no_memory(eight: Pipeline) -> None:
    refused = Preset(EIGHT_BIT, "", ALL, refused="forbidden")
    eight.spec = replace(eight.spec, presets=(*ONLY_LOSSLESS, refused))
    eight.eight.keep(2**60, eight.spec.dit)
    assert not eight.eight.blocks._weights


def test_one_expert_needs_room_for_one(eight: Pipeline) -> None:
    size = kept_bytes(eight.spec.dit)
    eight.eight.keep(size + 1, eight.spec.dit)
    assert not eight.eight.blocks.keep_weights
    eight.low = None
    eight.eight.keep(size + 1, eight.spec.dit)
    assert eight.eight.blocks.keep_weights
    assert list(eight.eight.blocks._weights) == list(eight.high.blocks)


def test_loras_reach_the_kept_weights(eight: Pipeline) -> None:
    eight.eight.keep(2**60, eight.spec.dit)
    plain = video(eight, EIGHT_BIT)
    styled = video(eight, EIGHT_BIT, LoraUse("style"))
    assert np.abs(styled - plain).mean() > 1
    assert np.abs(styled - video(eight, "lossless", LoraUse("style"))).mean() < np.abs(styled - plain).mean()
    assert np.array_equal(video(eight, EIGHT_BIT), plain)


def test_warming_up_runs_what_is_offered(eight: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    original = EightBitBlocks.run

    def counted(self: EightBitBlocks, block: object, *rest: object) -> object:
        seen.append(block)
        return original(self, block, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(EightBitBlocks, "run", counted)
    late, refused = EightBit((0,), first_steps=2), Preset("8bit-cache", "", ALL, refused="forbidden")
    eight.spec = replace(eight.spec, sizes=((64, 48),), presets=(Preset(EIGHT_BIT, "", late), refused))
    warm_up(eight)
    assert seen == [eight.high.blocks[1], eight.low.blocks[1]]  # type: ignore[union-attr]


def test_kept_bytes_are_those_of_a_model() -> None:
    a14b = DiTConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
    assert 10 < kept_bytes(a14b) / 2**30 < 14  # of an expert whose blocks take 23 GiB in bf16


@pytest.mark.parametrize("form", FORMATS)
def test_kept_bytes_are_those_of_the_weights(pipeline: Pipeline, form: str) -> None:
    operands = [
        operand
        for block in pipeline.high.blocks
        for operand in vars(Weights.of(block, FORMATS[form])).values()  # type: ignore[arg-type]
    ]
    tensors = [tensor for operand in operands for tensor in vars(operand).values()]
    found = sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))
    assert kept_bytes(pipeline.spec.dit, FORMATS[form]) == found

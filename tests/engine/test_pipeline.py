import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from engine.config import Canceled, Progress
from engine.dit import DiT
from engine.errors import OutOfMemory, RequestError
from engine.pipeline import Pipeline, to_uint8
from engine.requests import resolve
from kernels.attention.settled import Settled
from tests.engine.sinks import Frames


def test_a_request_becomes_frames_and_progress(pipeline: Pipeline, tmp_path: Path) -> None:
    sink, seen = Frames(), list[Progress]()
    request = resolve(pipeline.spec, "a cat", frame_num=5, sampling_steps=2, seed=3)
    result = pipeline.generate(
        request, sink, on_progress=seen.append, latents_out=tmp_path / "latents.safetensors"
    )
    assert (result.width, result.height, result.frames, result.fps, result.seed) == (64, 48, 5, 8, 3)
    assert sink.video.shape == (5, 48, 64, 3)
    assert [len(chunk) for chunk in sink.chunks] == [1, 4]
    steps = [(p.phase, p.step, p.steps) for p in seen]
    assert steps == [
        ("encoding", 0, 1), ("encoding", 1, 1),
        ("denoising", 0, 2), ("denoising", 1, 2), ("denoising", 2, 2),
        ("decoding", 0, 2), ("decoding", 1, 2), ("decoding", 2, 2),
    ]  # fmt: skip
    assert set(result.seconds) == {"encoding", "denoising", "decoding"}
    latents = load_file(tmp_path / "latents.safetensors")["latents"]
    assert latents.shape == (16, 2, 6, 8)
    assert latents.dtype == torch.float32


def test_the_same_seed_gives_the_same_video_and_another_does_not(pipeline: Pipeline) -> None:
    def video(seed: int, prompt: str = "a cat") -> np.ndarray:
        sink = Frames()
        pipeline.generate(resolve(pipeline.spec, prompt, frame_num=1, sampling_steps=2, seed=seed), sink)
        return sink.video

    first = video(3)
    assert np.array_equal(video(3), first)
    assert not np.array_equal(video(4), first)
    assert not np.array_equal(video(3, "two dancers"), first)


def test_an_empty_negative_prompt_is_the_models_own(pipeline: Pipeline) -> None:
    own = resolve(pipeline.spec, "a cat", negative_prompt=pipeline.spec.negative_prompt, seed=0)
    none = resolve(pipeline.spec, "a cat", seed=0)
    other = resolve(pipeline.spec, "a cat", negative_prompt="blurry", seed=0)
    assert torch.equal(pipeline.encode(own), pipeline.encode(none))
    assert not torch.equal(pipeline.encode(other), pipeline.encode(none))


@pytest.mark.parametrize(("guide", "batch"), [((1.0,), {1}), ((1.0, 4.0), {1, 2}), ((3.0,), {2})])
def test_guidance_1_takes_one_forward_a_step(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, guide: tuple[float, ...], batch: set[int]
) -> None:
    seen: list[int] = []
    original = DiT.forward

    def counted(self: DiT, latents: torch.Tensor, t: torch.Tensor, text: list, *rest: object) -> torch.Tensor:
        seen.append(len(text[0][0]))
        return original(self, latents, t, text, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(DiT, "forward", counted)
    request = resolve(pipeline.spec, "a", frame_num=1, sampling_steps=4, guide_scale=guide, shift=1.0)
    pipeline.generate(request, Frames())
    assert len(seen) == 4
    assert set(seen) == batch


def test_text_keys_and_values_are_made_once_an_expert(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[DiT] = []
    original = DiT.encode_text

    def counted(self: DiT, text: torch.Tensor) -> list:
        calls.append(self)
        return original(self, text)

    monkeypatch.setattr(DiT, "encode_text", counted)
    # shift 1, 8 steps: t = 999 ... 124, both sides of the boundary at 875
    pipeline.generate(resolve(pipeline.spec, "a", frame_num=1, sampling_steps=8, shift=1.0), Frames())
    assert calls == [pipeline.high, pipeline.low]


def test_the_boundary_itself_is_the_high_noise_experts(pipeline: Pipeline) -> None:
    assert pipeline.expert_at(875, (3.0, 4.0)) == (pipeline.high, 4.0)
    assert pipeline.expert_at(874, (3.0, 4.0)) == (pipeline.low, 3.0)


@pytest.mark.parametrize(
    ("after", "where"), [(0, "encoding, step 0"), (4, "denoising, step 2"), (6, "decoding")]
)
def test_cancel_at_a_step_boundary(pipeline: Pipeline, after: int, where: str) -> None:
    answers = iter([False] * after + [True])
    request = resolve(pipeline.spec, "a cat", frame_num=5, sampling_steps=3)
    with pytest.raises(Canceled, match=where):
        pipeline.generate(request, Frames(), should_cancel=lambda: next(answers))
    pipeline.generate(request, Frames())  # the next one is not disturbed


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("tried to allocate 7 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        MemoryError("the host's"),
        None,  # a real one: a petabyte on a CPU
    ],
)
def test_out_of_memory_fails_the_request_alone(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    request = resolve(pipeline.spec, "a cat", frame_num=1, sampling_steps=1)

    def fail(*_: object) -> None:
        if error is None:
            torch.empty(10**15, dtype=torch.uint8)
        else:
            raise error

    def video() -> np.ndarray:
        sink = Frames()
        pipeline.generate(request, sink)
        return sink.video

    expected, words = video(), "allocate" if error is None else re.escape(str(error))
    with monkeypatch.context() as patch:
        patch.setattr(DiT, "forward", fail)
        with pytest.raises(OutOfMemory, match=f"cpu ran out of memory at denoising, step 0 of 1: .*{words}"):
            video()
    assert np.array_equal(video(), expected)


def test_another_error_is_not_taken_for_memory(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(DiT, "forward", fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        pipeline.generate(resolve(pipeline.spec, "a cat", frame_num=1, sampling_steps=1), Frames())


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("prompt", {"prompt": "  "}),
        ("size", {"size": (64, 64)}),
        ("frame_num", {"frame_num": 6}),
        ("frame_num", {"frame_num": 85}),
        ("frame_num", {"frame_num": -3}),
        ("sampling_steps", {"sampling_steps": 0}),
        ("sampling_steps", {"sampling_steps": 1001}),
        ("shift", {"shift": 0.0}),
        ("shift", {"shift": 1e-15}),
        ("shift", {"shift": 100.5}),
        ("shift", {"shift": float("nan")}),
        ("guide_scale", {"guide_scale": (-1.0,)}),
        ("guide_scale", {"guide_scale": (3.0, 100.5)}),
        ("guide_scale", {"guide_scale": (float("nan"), 3.0)}),
        ("guide_scale", {"guide_scale": (1.0, 2.0, 3.0)}),
        ("seed", {"seed": -1}),
        ("seed", {"seed": 2**63}),
        ("sample_solver", {"solver": "euler"}),
        ("image", {"image": Path("a.png")}),
    ],
)
def test_bad_requests_name_the_field_and_what_is_allowed(
    pipeline: Pipeline, field: str, fields: dict[str, object]
) -> None:
    with pytest.raises(RequestError, match=f"^{field}: got .*; allowed: ") as caught:
        resolve(pipeline.spec, **{"prompt": "a cat", **fields})  # type: ignore[arg-type]
    assert caught.value.field == field


def test_one_guidance_counts_for_both_and_defaults_are_the_models(pipeline: Pipeline) -> None:
    request = resolve(pipeline.spec, "a cat")
    assert (request.size, request.frame_num, request.sampling_steps) == ((64, 48), 9, 4)
    assert (request.shift, request.guide_scale) == (5.0, (3.0, 4.0))
    assert resolve(pipeline.spec, "a cat", guide_scale=(2.0,)).guide_scale == (2.0, 2.0)
    assert resolve(pipeline.spec, "a cat").seed != request.seed


def test_the_bounds_themselves_are_allowed(pipeline: Pipeline) -> None:
    spec = pipeline.spec
    largest = resolve(
        spec, "a cat", frame_num=spec.max_frame_num, shift=100.0, sampling_steps=1000,
        guide_scale=(0.0, 100.0), seed=2**63 - 1,
    )  # fmt: skip
    assert (largest.frame_num, largest.guide_scale) == (spec.max_frame_num, (0.0, 100.0))
    assert pipeline.noise(replace(largest, frame_num=1), (64, 48)).isfinite().all()  # torch takes such a seed
    least = resolve(spec, "a cat", frame_num=1, shift=0.01, sampling_steps=1, guide_scale=(0.0,), seed=0)
    assert (least.frame_num, least.seed) == (1, 0)


def test_noise_is_that_of_a_cpu_generator(pipeline: Pipeline) -> None:
    request = resolve(pipeline.spec, "a cat", frame_num=5, seed=11)
    expected = torch.randn(16, 2, 6, 8, generator=torch.Generator().manual_seed(11))
    assert torch.equal(pipeline.noise(request, (64, 48)), expected)


def test_pixels_are_clamped_and_rounded() -> None:
    # -1 -> 0, 1 -> 255, 0 -> 127.5 -> 128 (to even), beyond is cut
    frames = torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0]).view(1, 1, 1, 5).expand(3, 1, 1, 5)
    assert to_uint8(frames)[0, 0, 0].tolist() == [0, 0, 128, 255, 255]


@pytest.mark.parametrize("fault", ["attention", "something else"])
def test_latents_that_are_not_finite_are_made_once_more_with_another_attention(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """As a GPU's attention would: one score out of proportion makes its row NaN."""
    settled = Settled()
    monkeypatch.setattr("engine.pipeline.settled", settled)
    right = pipeline.sequence.attend
    asked: list[bool] = []

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        asked.append(settled.ask())
        broken = asked[-1] or fault != "attention"
        return right(q, k, v) * (float("nan") if broken else 1.0)

    def video() -> np.ndarray:
        sink = Frames()
        pipeline.generate(resolve(pipeline.spec, "a cat", frame_num=1, sampling_steps=2, seed=3), sink)
        return sink.video

    want = video()
    monkeypatch.setattr(pipeline.sequence, "attend", attend)
    got = video()
    half = len(asked) // 2
    assert asked == [True] * half + [False] * half
    assert settled.allowed == (fault != "attention")
    if fault == "attention":
        assert np.array_equal(got, want)
        asked.clear()
        assert np.array_equal(video(), want)
        assert asked == [False] * half, "it is done without from then on"


def test_a_probe_before_the_video_is_no_reason_to_make_it_again(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what kernels did for these latents can have spoilt them."""
    settled = Settled()
    settled.ask()
    monkeypatch.setattr("engine.pipeline.settled", settled)
    calls: list[int] = []

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return torch.full_like(q, float("nan"))

    request = resolve(pipeline.spec, "a cat", frame_num=1, sampling_steps=1, seed=3, guide_scale=(1.0,))
    monkeypatch.setattr(pipeline.sequence, "attend", attend)
    pipeline.generate(request, Frames())
    assert len(calls) == len(pipeline.high.blocks)
    assert settled.allowed


def test_a_video_that_is_broken_anyway_does_not_bring_back_what_another_gave_up(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A needs the other attention; B is NaN with any, as by a broken LoRA; then A once more."""
    settled = Settled()
    monkeypatch.setattr("engine.pipeline.settled", settled)
    right = pipeline.sequence.attend
    asked: list[bool] = []
    always = [False]

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        asked.append(settled.ask())
        return right(q, k, v) * (float("nan") if asked[-1] or always[0] else 1.0)

    monkeypatch.setattr(pipeline.sequence, "attend", attend)
    runs: list[int] = []
    for broken in (False, True, False):
        always[0] = broken
        asked.clear()
        pipeline.generate(resolve(pipeline.spec, "a cat", frame_num=1, sampling_steps=1, seed=3), Frames())
        runs.append(len(asked))
        assert not settled.allowed
        assert not asked[-1]
    assert runs[0] == 2 * runs[1] == 2 * runs[2], "A alone was made twice, the first time"

"""After the warm-up the first job finds what the tenth finds; what compilers made survives a restart."""

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from engine.compiled import keep_compiled
from engine.config import Task
from engine.images import size_by_area
from engine.load import load_pipeline
from engine.requests import resolve
from engine.rope import rope_table
from engine.warmup import served_sizes, warm_up
from tests.engine.sinks import Frames

JOBS = 10


def test_the_first_job_runs_like_the_tenth(tiny: Path) -> None:
    pipeline = load_pipeline(tiny, device="cpu")
    rope_table.cache_clear()
    warm = warm_up(pipeline)
    assert [w.size for w in warm] == list(pipeline.spec.sizes)
    assert [w.denoising > 0 for w in warm] == [True, False, True, True]  # 48*64 has 64*48's tokens
    made = rope_table.cache_info().misses
    request = resolve(pipeline.spec, "a cat", size=(96, 64), seed=1, sampling_steps=2)
    seconds = []
    for _ in range(JOBS):
        began = time.perf_counter()
        pipeline.generate(request, Frames())
        seconds.append(time.perf_counter() - began)
    print(f"first {seconds[0]:.3f} s, tenth {seconds[-1]:.3f} s, median {statistics.median(seconds):.3f} s")
    assert rope_table.cache_info().misses == made  # nothing that is made once a shape was left to it
    assert seconds[0] < 3 * max(seconds[1:])


@pytest.mark.parametrize("task", ["i2v", "ti2v"])
def test_image_models_are_warmed_up_with_what_images_need(image_models: dict[Task, Path], task: Task) -> None:
    pipeline = load_pipeline(image_models[task], device="cpu")
    seen: list[tuple[int, ...]] = []
    sets: set[int] = set()

    def look(_: object, inputs: tuple[torch.Tensor, ...]) -> None:
        seen.append(tuple(inputs[0].shape))
        sets.add(inputs[1].shape[1])

    handle = pipeline.high.register_forward_pre_hook(look)
    warm_up(pipeline)
    handle.remove()
    assert {shape[1] for shape in seen} == {pipeline.spec.dit.in_channels}
    assert sets == ({1, 2} if task == "ti2v" else {1})  # with an image, and without


def test_a_4_to_3_pictures_odd_token_count_is_served_warm() -> None:
    # wan22.md: 1280*720's area gives 73,899 tokens.
    width, height = size_by_area((4, 3), 1280 * 720, 8, 2)
    assert 21 * (height // 16) * (width // 16) == 73_899


def test_served_sizes_hold_the_photos(image_models: dict[Task, Path]) -> None:
    assert served_sizes(load_pipeline(image_models["i2v"], device="cpu")) == [(64, 96), (64, 80), (80, 64)]


def test_compilers_are_told_where_to_keep_what_they_make(tmp_path: Path) -> None:
    environment = {"CUDA_CACHE_PATH": "/mine"}
    keep_compiled(tmp_path, environment)
    assert environment["CUDA_CACHE_PATH"] == "/mine"
    assert environment["TRITON_CACHE_DIR"] == str(tmp_path / "triton")
    assert environment["FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"] == "1"
    assert (tmp_path / "inductor").is_dir()


COMPILE = """
import sys, time
from pathlib import Path
from engine.compiled import keep_compiled
keep_compiled(Path(sys.argv[1]))
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels.vae_norm_silu import triton as module

kernel = module._join_kernel
began = time.perf_counter()
signature = {name: "*bf16" if name.endswith("_ptr") else "i32" for name in kernel.arg_names}
constants = {p.name: 16 for p in kernel.params if p.is_constexpr}
signature |= dict.fromkeys(constants, "constexpr")
triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32))
print(time.perf_counter() - began)
"""


def test_a_compiled_kernel_survives_a_restart(tmp_path: Path) -> None:
    """Triton's own compiler for an H100, which needs no GPU: the second process compiles nothing."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    seconds, made = [], []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", COMPILE, str(tmp_path)],
            env=environment, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        seconds.append(float(done.stdout))
        made.append({p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.cubin")})
    print(f"compiled in {seconds[0]:.2f} s, found again in {seconds[1]:.2f} s")
    assert made[0]
    assert made[1] == made[0]
    assert seconds[1] < seconds[0]

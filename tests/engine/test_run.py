import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine.errors import RequestError
from engine.run import run
from engine.video import decode_video
from tests.engine.oracle import relative
from tests.engine.ranks import environment

FIELDS = (
    "--size", "96*64", "--frame-num", "5", "--shift", "3", "--sampling-steps", "2",
    "--guide-scale", "2.0,3.0", "--seed", "9", "--sample-solver", "dpm++",
    "--negative-prompt", "blurry", "--dtype", "float32",
)  # fmt: skip


def test_in_process_and_under_torchrun_alike(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(
        model=tiny,
        prompt="a cat",
        out=tmp_path / "one" / "video.mp4",
        save_latents=tmp_path / "one.safetensors",
        size=(96, 64),
        frame_num=5,
        shift=3.0,
        sampling_steps=2,
        guide_scale=(2.0, 3.0),
        seed=9,
        sample_solver="dpm++",
        negative_prompt="blurry",
        dtype="float32",
    )
    words = capsys.readouterr()
    assert words.out.splitlines()[0] == "seed 9"
    assert words.out.splitlines()[-1] == str(tmp_path / "one" / "video.mp4")
    assert "2/2" in words.err  # the progress bar
    info, _ = decode_video(tmp_path / "one" / "video.mp4")
    assert (info.frames, info.width, info.height, info.fps) == (5, 96, 64, 8)

    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "infra.cli", "run", "--model", str(tiny), "a cat", "--out", str(tmp_path / "two.mp4"),
        "--save-latents", str(tmp_path / "two.safetensors"), *FIELDS,
    ]  # fmt: skip
    done = subprocess.run(
        command, env=environment(), capture_output=True, text=True, timeout=150, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("seed 9") == 1  # rank 0 alone speaks
    assert decode_video(tmp_path / "two.mp4")[0] == info
    one, two = (load_file(tmp_path / f"{name}.safetensors")["latents"] for name in ("one", "two"))
    assert one.dtype == torch.float32
    assert one.shape == (16, 2, 8, 12)
    assert relative(two, one) < 1e-5


def test_defaults_and_a_random_seed_that_is_echoed(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(model=tiny, prompt="a cat", out=tmp_path / "a.mp4", frame_num=1, guide_scale=2.0)
    seed = int(capsys.readouterr().out.split()[1])
    assert 0 <= seed < 2**32
    assert decode_video(tmp_path / "a.mp4")[0].frames == 1


def test_a_bad_dtype_is_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"dtype.*float32, bfloat16"):
        run(model=tiny, prompt="a cat", out=tmp_path / "a.mp4", dtype="float8")


def test_bfloat16_is_near_float32(tiny: Path, tmp_path: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        run(
            model=tiny, prompt="a cat", out=tmp_path / "a.mp4", frame_num=1, seed=1, dtype=dtype,
            save_latents=tmp_path / f"{dtype}.safetensors",
        )  # fmt: skip
    exact, rounded = (
        load_file(tmp_path / f"{dtype}.safetensors")["latents"] for dtype in ("float32", "bfloat16")
    )
    assert 1e-5 < relative(rounded, exact) < 0.05

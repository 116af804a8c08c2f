import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from engine.config import Task
from engine.errors import RequestError
from engine.load import load_pipeline
from engine.run import run
from engine.video import decode_video
from infra.cli import invoke
from tests.engine.loras import write_lora
from tests.engine.oracle import relative
from tests.engine.ranks import environment
from tests.engine.saved import save_model

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


KINDS = ("i2v", "ti2v with an image", "ti2v", "diffusers t2v", "diffusers i2v")


@pytest.fixture(scope="module")
def commands(
    image_models: dict[Task, Path], picture: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[str]]:
    """Arguments of `reel run` for each of KINDS, but for where results go."""
    generator = torch.Generator().manual_seed(3)
    folder = tmp_path_factory.mktemp("saved")
    for task in ("t2v", "i2v"):
        save_model(folder / task, generator, task, with_image=task == "i2v")
    models = (image_models["i2v"], image_models["ti2v"], image_models["ti2v"], folder / "t2v", folder / "i2v")
    return {
        kind: [
            "a boat", "--model", str(model), "--sampling-steps", "2", "--seed", "2", "--guide-scale", "2.0",
            *(() if kind in ("ti2v", "diffusers t2v") else ("--image", str(picture))),
        ]
        for kind, model in zip(KINDS, models, strict=True)
    }  # fmt: skip


def with_results(arguments: list[str], stem: Path) -> list[str]:
    return [*arguments, "--out", f"{stem}.mp4", "--save-latents", f"{stem}.safetensors"]


@pytest.fixture(scope="module")
def under_torchrun(
    commands: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str, str]:
    """(where two ranks of torchrun left the results of all kinds, what they printed, what they logged)."""
    folder = tmp_path_factory.mktemp("torchrun")
    cases = [with_results(commands[kind], folder / kind) for kind in KINDS]
    (folder / "cases.json").write_text(json.dumps(cases))
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            "-m", "tests.engine.run_ranks", str(folder / "cases.json"),
        ],
        env=environment(), capture_output=True, text=True, timeout=150, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder, done.stdout, done.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_family_in_process_and_under_torchrun_alike(
    commands: dict[str, list[str]],
    under_torchrun: tuple[Path, str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    kind: str,
) -> None:
    assert invoke(["run", *with_results(commands[kind], tmp_path / kind)]) == 0
    words = capsys.readouterr()
    assert words.out.startswith("seed 2\n")
    assert "2/2" in words.err  # the progress bar
    part = "loading transformer" if "diffusers" in kind else "loading VAE"
    assert part in words.err  # the loading's own bar, with bytes and a rate
    info, frames = decode_video(tmp_path / f"{kind}.mp4")
    stride, channels = (16, 48) if "ti2v" in kind else (8, 16)
    one, two = (
        load_file(folder / f"{kind}.safetensors")["latents"] for folder in (tmp_path, under_torchrun[0])
    )
    assert one.shape == (channels, 2, info.height // stride, info.width // stride)
    # The image models' default is upright, the saved ones' is not, and a picture's aspect counts more.
    assert (info.width > info.height) == (kind != "ti2v")
    assert np.ptp(frames) > 50
    assert relative(two, one) < 1e-5
    assert decode_video(under_torchrun[0] / f"{kind}.mp4")[0] == info


def test_rank_0_alone_speaks_and_shows_its_memory_plan(under_torchrun: tuple[Path, str, str]) -> None:
    _, words, log = under_torchrun
    assert words.count("seed 2") == len(KINDS)
    assert log.count("memory of") == log.count(", rank 0 of 2") == len(KINDS)
    assert log.count("text keys and values") == len(KINDS)


def test_flags_for_loras_memory_and_checksums(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    def reel(*more: str) -> int:
        latents = str(tmp_path / f"{len(more)}.safetensors")
        common = ("run", "a cat", "--model", str(tiny), "--out", str(tmp_path / "a.mp4"))
        fields = ("--frame-num", "1", "--seed", "1", "--sampling-steps", "1", "--save-latents", latents)
        return invoke([*common, *fields, *more])

    write_lora(tmp_path / "loras" / "style.safetensors", load_pipeline(tiny, device="cpu").high)
    folder = ("--lora-dir", str(tmp_path / "loras"))
    assert reel() == 0
    assert reel("--loras", "style:0.5:high", *folder) == 0
    plain, changed = (load_file(tmp_path / f"{n}.safetensors")["latents"] for n in (0, 4))
    assert relative(changed, plain) > 1e-3
    capsys.readouterr()
    assert reel("--loras", "unknown", *folder) == 1
    assert "reel: loras: got 'unknown'; allowed: style" in capsys.readouterr().err
    assert reel("--loras", "style:much") == 1
    assert "expected NAME, NAME:0.7 or NAME:0.7:EXPERT" in capsys.readouterr().err
    assert reel("--verify") == 1
    assert "has no checksums to verify" in capsys.readouterr().err
    assert reel("--gpu-memory-gib", "0.001") == 1
    assert "GiB are free" in capsys.readouterr().err
    assert "text encoder" in caplog.text  # the table

"""Two real processes that load one checkpoint: each byte is read once, and every rung makes one video."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.config import Task
from engine.load import load_pipeline
from engine.pipeline import Pipeline
from engine.tiny import make_tiny
from tests.engine.loading_ranks import LORA, SIZE, photo_video, video
from tests.engine.loras import write_lora
from tests.engine.oracle import relative
from tests.engine.ranks import cached_latents, environment

SECONDS = 150
RUNGS = ("resident", "branches", "text", "shard")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint with a LoRA, and checksums of which the high-noise expert's are wrong."""
    folder = make_tiny(tmp_path_factory.mktemp("checkpoint"), seed=2)
    reel = json.loads((folder / "reel.json").read_text())
    reel |= {"sizes": ["{}*{}".format(*SIZE)], "presets": {"8bit": {"keep_blocks": []}}}
    (folder / "reel.json").write_text(json.dumps(reel))
    write_lora(folder / "loras" / "style.safetensors", load_pipeline(folder, device="cpu").high)
    shards = sorted(folder.glob("high_noise_model/*.safetensors"))
    lines = [f"{'0' * 64}  {shard.relative_to(folder)}" for shard in shards[:1]]
    (folder / "SHA256SUMS").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def alone(checkpoint: Path) -> Pipeline:
    return load_pipeline(checkpoint, device="cpu")


@pytest.fixture(scope="module")
def ranks(
    checkpoint: Path, image_models: dict[Task, Path], picture: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, Any]]]:
    """(what rank 0 wrote, what both found)."""
    folder = tmp_path_factory.mktemp("ranks")
    paths = (checkpoint, folder, image_models["i2v"], image_models["ti2v"], picture)
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.engine.loading_ranks", *map(str, paths)],
            env={**environment(), "RANK": str(rank), "WORLD_SIZE": "2", "MEETING": str(folder / "meeting")},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=SECONDS)[0].decode() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    return folder, [json.loads((folder / f"results.{rank}").read_text()) for rank in range(2)]


Ranks = tuple[Path, list[dict[str, Any]]]


def test_two_ranks_read_each_byte_once_and_have_every_tensor(ranks: Ranks) -> None:
    found = [result["reading"] for result in ranks[1]]
    for dtype in ("torch.float32", "torch.bfloat16"):
        own = [reading[f"own {dtype}"] for reading in found]
        print(f"{dtype}: {own} of {found[0]['size']} bytes")
        assert sum(own) == found[0]["size"]
        assert max(own) - min(own) < 64
        assert all(reading[f"equal {dtype}"] and reading[f"told {dtype}"] for reading in found)


@pytest.mark.parametrize("rung", RUNGS)
def test_every_rung_makes_the_same_video(ranks: Ranks, alone: Pipeline, rung: str) -> None:
    with np.load(ranks[0] / f"{rung}-1x2.npz") as files:
        plain, with_lora, again = (files[name] for name in files)
    for frames, expected in ((plain, video(alone)), (with_lora, video(alone, LORA)), (again, plain)):
        assert np.abs(frames.astype(int) - expected).max() <= 1  # a level of 255: sums in another order
    assert np.abs(with_lora.astype(int) - plain).max() > 8


@pytest.mark.parametrize("task", ["i2v", "ti2v"])
def test_a_4_to_3_picture_over_two_ranks_makes_the_video_of_one(
    ranks: Ranks, image_models: dict[Task, Path], picture: Path, task: Task
) -> None:
    expected = photo_video(load_pipeline(image_models[task], device="cpu"), picture)
    assert np.abs(np.load(ranks[0] / f"photo-{task}.npy").astype(int) - expected).max() <= 1


@pytest.mark.parametrize("rung", RUNGS)
def test_ranks_keep_their_share_and_lose_a_lora_without_a_trace(ranks: Ranks, rung: str) -> None:
    for result in ranks[1]:
        assert result[rung] == {"restored": True, "changed": True, "rows": True, "again": True}


def test_a_branch_without_a_pass_gathers_sharded_blocks(ranks: Ranks, checkpoint: Path) -> None:
    expected = cached_latents(load_pipeline(checkpoint, device="cpu"))
    for result in ranks[1]:
        got = torch.tensor(result["reused"])
        assert got[-2] > 0  # guidance was reused
        assert torch.equal(got[-3:], expected[-3:])
        assert relative(got, expected) < 1e-5


def test_a_wrong_checksum_is_every_ranks_error(ranks: Ranks) -> None:
    assert [result["verify"] for result in ranks[1]] == [True, True]


def test_ranks_that_hold_8_bit_weights_alone_make_the_same_video(ranks: Ranks) -> None:
    assert [result["held"] for result in ranks[1]] == [True, True]


def test_no_rank_returns_before_all_have_loaded(ranks: Ranks) -> None:
    """Else the others would wait for rank 0 in a collective call, whose patience is short."""
    (loaded, _), (_, returned) = (result["meeting"] for result in ranks[1])
    assert returned >= loaded > 0


def test_decoding_a_stripe_takes_the_memory_that_is_planned(ranks: Ranks) -> None:
    for planned, real in (result["stripes"] for result in ranks[1]):
        print(f"planned {planned:,}, real {real:,}")
        assert real <= planned < 1.1 * real

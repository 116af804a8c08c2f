"""A node that holds 8-bit weights alone: the videos of one that has all, in less memory, and nothing else."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from engine import loader
from engine.checkpoint import read_dit_config
from engine.config import LoraUse
from engine.dit_block import Block
from engine.eight_bit import Weights, hold
from engine.errors import CheckpointError, RequestError
from engine.ladder import plan_memory
from engine.layout import find_layout
from engine.load import load_pipeline
from engine.memory import sizes_of
from engine.parallel.mesh import Mesh
from engine.pipeline import Pipeline
from engine.preset_memory import held_block_bytes
from engine.presets import EightBit, Machine, held_blocks, offers
from engine.requests import resolve
from engine.warmup import warm_up
from tests.engine.loras import write_lora
from tests.engine.sinks import Frames

CPU = torch.device("cpu")
# Of the tiny model's two blocks: both in 8 bits by the one preset, the second alone by the other.
PRESETS = {"8bit": {"keep_blocks": []}, "8bit-cache": {"keep_blocks": [0], "step_threshold": 9, "first": 1}}


def write_presets(folder: Path, presets: dict[str, object]) -> Path:
    reel = json.loads((folder / "reel.json").read_text())
    (folder / "reel.json").write_text(json.dumps(reel | {"sizes": ["64*48"], "presets": presets}))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model offering two presets in 8 bits, with a LoRA."""
    folder = tmp_path_factory.mktemp("held") / "model"
    shutil.copytree(tiny, folder)
    write_lora(folder / "loras" / "style.safetensors", load_pipeline(folder, device="cpu").high)
    return write_presets(folder, PRESETS)


@pytest.fixture(scope="module")
def held(checkpoint: Path) -> Pipeline:
    return load_pipeline(checkpoint, device="cpu", weights="8bit")


def video(pipeline: Pipeline, quality: str) -> np.ndarray:
    sink = Frames()
    request = resolve(pipeline.spec, "a cat", frame_num=5, sampling_steps=3, seed=3, quality=quality)
    pipeline.generate(request, sink)
    return sink.video


def test_videos_are_those_of_a_node_with_all_weights(checkpoint: Path, held: Pipeline) -> None:
    full = load_pipeline(checkpoint, device="cpu")
    for quality in PRESETS:
        assert np.array_equal(video(held, quality), video(full, quality))
    assert not np.array_equal(video(held, "8bit"), video(full, "lossless"))
    warm_up(held)  # nothing in it needs what isn't there


def test_only_blocks_that_every_preset_has_in_8_bits_are_held(held: Pipeline) -> None:
    assert held.low is not None
    for expert in (held.high, held.low):
        first, second = expert.blocks
        assert first not in held.eight.blocks.held
        assert second in held.eight.blocks.held
        gone = {name for name, parameter in second.named_parameters() if not parameter.numel()}
        assert len(gone) == 8
        assert all(parameter.numel() for parameter in first.parameters())
        assert not any(name.startswith("cross_attn.k") for name in gone)


def test_what_needs_the_published_weights_is_refused(held: Pipeline) -> None:
    refused = {preset.name: preset.refused for preset in held.spec.presets}
    assert refused["8bit"] == refused["8bit-cache"] == ""
    for name in ("lossless", "draft"):
        assert "8-bit weights alone" in refused[name]
        with pytest.raises(RequestError, match=rf"allowed: 8bit, 8bit-cache \({name}: .*--weights 8bit"):
            resolve(held.spec, "a cat", quality=name)
    assert held.spec.loras == ()
    request = resolve(held.spec, "a cat", quality="8bit", frame_num=1, loras=(LoraUse("style"),))
    with pytest.raises(RequestError, match=r"loras.*--weights 8bit"):
        held.generate(request, Frames())


def test_weights_that_are_gone_compute_nothing(held: Pipeline) -> None:
    text = held.high.encode_text(torch.zeros(1, 8, held.spec.dit.text_dim))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        held.high(torch.zeros(1, 16, 1, 4, 4), torch.full((1, 1), 500.0), text)


def test_one_block_at_a_time_is_whole_and_the_plan_adds_up(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, told = find_layout(checkpoint), list[tuple[str, int]]()
    config = read_dit_config(layout)

    def watched(block: Block) -> Weights:
        told.append(("whole before", sum(p.nbytes for p in block.parameters())))
        found = hold(block)
        told.append(("whole after", sum(p.nbytes for p in block.parameters())))
        return found

    monkeypatch.setattr(loader, "hold", watched)
    fp32 = torch.float32
    found = loader.Loader(
        Mesh.single(), CPU, fp32, fp32, lambda part, came, total: told.append(("read", came))
    )
    high, low, exchange = found.experts(layout, config, "resident", {0, 1})
    sizes = sizes_of([layout.high.entries], [], [], torch.float32, torch.float32)
    planned = held_block_bytes(sizes.block, config, torch.float32)
    rows = [row for block in high.blocks for row in vars(found.held[block]).values()]  # type: ignore[index]
    in_8_bits = sum(row.data.nbytes + row.scale.nbytes for row in rows) // 2
    a_block = [("read", sizes.block), ("whole before", sizes.block), ("whole after", planned - in_8_bits)]
    events = [event for event in told if event[1] >= planned - in_8_bits]  # what is beside the blocks is less
    assert [event for event in events if event[0] != "read" or event[1] == sizes.block] == 4 * a_block
    assert (low is not None, exchange) == (True, None)
    beside = sum(p.nbytes for name, p in high.named_parameters() if not name.startswith("blocks."))
    assert beside + 2 * planned == sizes.rest + 2 * planned < sizes.expert


def test_the_plan_counts_what_is_held(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "engine.ladder"):
        load_pipeline(checkpoint, device="cpu", weights="8bit")
    assert "high-noise expert, 1 of 2 blocks in 8 bits" in caplog.text
    with pytest.raises(CheckpointError, match="which moves blocks"):
        load_pipeline(checkpoint, device="cpu", weights="8bit", rung="host")
    spec, layout = load_pipeline(checkpoint, device="cpu").spec, find_layout(checkpoint)
    whole, part = (
        plan_memory(spec, layout, Mesh.single(), CPU, torch.float32, torch.float32, held=held)
        for held in ((), (0, 1))
    )
    assert part.total < whole.total


def test_a_model_without_such_a_preset_is_refused(tiny: Path) -> None:
    with pytest.raises(CheckpointError, match=r"leaves no preset .*8bit: the model has no calibrated"):
        load_pipeline(tiny, device="cpu", weights="8bit")


def test_first_steps_in_full_need_the_published_weights() -> None:
    told = {"8bit": {"first_steps": 2}, "8bit-cache": {"keep_blocks": [0]}}
    presets = offers(told, Machine(only_eight=True))
    assert "its first 2 steps are lossless" in next(p.refused for p in presets if p.name == "8bit")
    assert held_blocks(presets, 4) == {1, 2, 3}
    assert held_blocks(offers({"8bit": {}}, Machine(only_eight=True)), 4) == {1, 2}
    assert EightBit().first_steps == 0

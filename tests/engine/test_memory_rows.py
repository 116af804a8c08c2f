"""Each row of the memory plan at full size, added up by hand: none may be forgotten or counted twice."""

from dataclasses import replace

import pytest
import torch

from engine.footprint import LiveBytes, decoding_bytes, denoising_bytes, encoding_bytes
from engine.ladder import free_memory
from engine.memory import GIB, MemoryPlan, Rung, make_plan
from engine.parallel.mesh import Mesh
from engine.specs import I2V_A14B, T2V_A14B, TI2V_5B, Facts
from tests.engine.oracle import twin_vaes
from tests.engine.test_memory import BF16, FP16, family

KV = "text keys and values (of one expert at a time)"
GRID = (21, 90, 160)  # latents of 1280x720 x 81 frames; 75,600 tokens


def plan(facts: Facts, mesh: Mesh, rung: Rung = "resident", on_gpu: bool = True) -> MemoryPlan:
    spec, sizes = family(facts)
    return make_plan(
        spec, sizes, mesh, rung, BF16, FP16, on_gpu=on_gpu, available=80 * GIB, host_available=900 * GIB
    )  # fmt: skip


@pytest.mark.parametrize("layout", [(1, 1), (1, 8), (2, 4)])
def test_everything_resident(layout: tuple[int, int]) -> None:
    spec, sizes = family(T2V_A14B)
    mesh = Mesh(0, *layout)
    tokens, both = 75_600 // mesh.ulysses, 2 // mesh.guidance
    # By collectives 5 tensors a row of prompts; by pushing 2 lanes of 4 regions, which may be more.
    window = 0 if mesh.size == 1 else max(5 * both, 8) * tokens * 5120 * 2 + GIB // 2
    expected = {
        "text encoder": sizes.text,
        "high-noise expert": sizes.expert,
        "low-noise expert": sizes.expert,
        "VAE": sizes.vae,
        KV: 2 * 512 * 5120 * 2 * 40 * both,
        "communication buffers": window,
        "positions of the last shapes": 5 * 75_600 * 128 * 4,  # cos and sin of 64 pairs
        "libraries' workspace": GIB,
    }
    found = plan(T2V_A14B, mesh)
    assert dict(found.rows) == expected
    assert len(found.rows) == len(expected)
    part = {1: GRID, 8: (21, 90, 160 // 8 + 1)}[mesh.size]  # and the neighbour's edge
    phases = {
        "activations, denoising": denoising_bytes(spec.dit, tokens, both, BF16),
        "activations, decoding": decoding_bytes(spec.vae, part, FP16),
    }
    assert dict(found.phases) == phases
    assert found.total == sum(expected.values()) + max(phases.values())
    assert found.host == 0
    cpu = dict(plan(T2V_A14B, mesh, on_gpu=False).rows)
    assert cpu["libraries' workspace"] == 0
    assert cpu["communication buffers"] == max(window - GIB // 2, 0)


def test_what_leaves_the_gpu_is_the_hosts() -> None:
    _, sizes = family(T2V_A14B)
    text = plan(T2V_A14B, Mesh(), "text")
    assert (dict(text.rows)["text encoder"], text.host) == (0, sizes.text)
    assert plan(T2V_A14B, Mesh(1, 1, 8), "text").host == 0, "rank 0 alone has it"
    host = plan(T2V_A14B, Mesh(), "host")
    rows = dict(host.rows)
    assert rows["one expert's blocks"] == 40 * sizes.block
    assert rows["exchange buffer"] == 64 << 20
    assert rows["the experts' other weights"] == 2 * sizes.rest
    assert host.host == sizes.text + sizes.pinned
    assert not replace(host, host_available=host.host - 1).fits
    assert replace(host, host_available=host.host, available=host.total).fits


def test_sharded_experts_gather_three_blocks() -> None:
    _, sizes = family(T2V_A14B)
    rows = dict(plan(T2V_A14B, Mesh(0, 2, 4), "shard").rows)
    matrices = (8 * 5120**2 + 2 * 5120 * 13824) * 2
    assert sizes.block - sizes.block_whole == matrices
    assert rows["gathered blocks"] == 3 * matrices
    assert rows["low-noise expert, 1/8"] == 40 * (sizes.block_whole + matrices // 8) + sizes.rest


def test_image_models_encode_a_video_or_one_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    """I2V its image with all the empty frames behind it, TI2V the image alone, at a time of its own."""
    grids: list[tuple[int, int, int]] = []
    monkeypatch.setattr("engine.memory.decoding_bytes", lambda *of: 0)
    monkeypatch.setattr("engine.memory.encoding_bytes", lambda config, grid, dtype: grids.append(grid) or 7)
    phases = dict(plan(I2V_A14B, Mesh()).phases)
    assert phases["activations, image encoding"] == 7
    frames, rows, columns = grids.pop()
    assert (frames, rows * columns) == (21, 90 * 160)  # as an image of 1:1 has, too
    phases = dict(plan(TI2V_5B, Mesh()).phases)
    assert phases["activations, image encoding"] == 7
    assert grids.pop() == (1, 44, 80)
    spec, _ = family(TI2V_5B)
    assert phases["activations, denoising"] == denoising_bytes(spec.dit, 21 * 22 * 40, 2, BF16, 2)
    assert "activations, image encoding" not in dict(plan(T2V_A14B, Mesh()).phases)


@pytest.mark.parametrize("kind", ["2.1", "2.2"])
def test_planned_encoding_is_that_of_a_real_video(generator: torch.Generator, kind: str) -> None:
    """21 frames, of which the plan looks at nine and adds the others' pixels."""
    vae = twin_vaes(generator, kind).ours
    stride = vae.config.stride[1]
    with torch.inference_mode(), LiveBytes() as live:
        vae.encode(torch.empty(1, 3, 21, 2 * stride, 4 * stride))
    planned = encoding_bytes(vae.config, (6, 2, 4), torch.float32)
    print(f"{live.peak:,} planned {planned:,}")
    assert planned == pytest.approx(live.peak, rel=0.03)


def test_ranks_share_the_hosts_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.ladder._free_host_memory", lambda: 800)
    assert free_memory(torch.device("cpu"), 1) == (800, 800)
    assert free_memory(torch.device("cpu"), 8) == (100, 100)

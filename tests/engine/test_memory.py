"""The memory plan against what a tiny model really allocates, and at full size against known figures."""

import json
import logging
import lzma
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.config import DiTConfig, ModelSpec, VAEConfig
from engine.footprint import LiveBytes, decoding_bytes, denoising_bytes
from engine.ladder import DoesNotFit, allowed, choose
from engine.load import load_pipeline
from engine.memory import GIB, MemoryPlan, Rung, Sizes, largest, make_plan, sizes_of
from engine.parallel.mesh import Mesh
from engine.pipeline import Pipeline
from engine.preset_memory import held_block_bytes
from engine.specs import I2V_A14B, T2V_A14B, TI2V_5B, Facts, make_spec
from engine.weights import Entry

PUBLISHED: dict[str, dict[str, list[int]]] = json.loads(
    lzma.decompress((Path(__file__).parent / "data" / "wan22_tensors.json.xz").read_bytes())
)
BF16, FP16 = torch.bfloat16, torch.float16


def published(name: str) -> dict[str, Entry]:
    return {key: Entry(Path("x"), key, tuple(shape)) for key, shape in PUBLISHED[name].items()}


def family(facts: Facts, frames: int = 81) -> tuple[ModelSpec, Sizes]:
    """A published model in bf16 with an fp16 VAE, at its largest size and this many frames."""
    five = facts is TI2V_5B
    vae = VAEConfig(
        "2.2" if five else "2.1", 160 if five else 96, 256 if five else 96, 48 if five else 16,
        facts.latent_mean, facts.latent_std, stride=(4, 16, 16) if five else (4, 8, 8),
    )  # fmt: skip
    channels = {"T2V-A14B": (16, 16), "I2V-A14B": (36, 16), "TI2V-5B": (48, 48)}[facts.name]
    dit = DiTConfig(3072, 14336, 24, 30, *channels) if five else DiTConfig(5120, 13824, 40, 40, *channels)
    expert = published(facts.name)
    sizes = sizes_of(
        [expert] if five else [expert, expert],
        published("UMT5-XXL").values(), published(f"VAE{vae.kind}").values(), BF16, FP16,
    )  # fmt: skip
    return make_spec(replace(facts, max_frame_num=frames), dit, vae), sizes


def test_blocks_in_8_bits_alone_take_half_the_room() -> None:
    """A14B with its first and last block whole: each expert's matrices at a byte a value."""
    spec, sizes = family(T2V_A14B)
    block = held_block_bytes(sizes.block, spec.dit, BF16)
    # By hand: 6 x 5120^2 + 2 x 5120 x 13824 values in 8 bits; text keys' and values' 2 x 5120^2 stay in bf16.
    assert block == pytest.approx(6 * 5120**2 + 2 * 5120 * 13824 + 2 * 2 * 5120**2, rel=0.002)
    held = replace(sizes, held=38, held_block=block)
    assert held.expert == sizes.expert - 38 * (sizes.block - block)

    def plan(sizes: Sizes) -> MemoryPlan:
        return make_plan(
            spec, sizes, Mesh.single(), "branches", BF16, FP16,
            on_gpu=True, available=80 * GIB, host_available=0,
        )  # fmt: skip

    saved = plan(sizes).total - plan(held).total
    print(plan(held).table())
    print(f"an expert {sizes.expert / 1e9:.1f} GB, in 8 bits {held.expert / 1e9:.1f} GB")
    assert saved == 2 * (sizes.expert - held.expert) > 22e9
    assert held.expert < 18.5e9
    names = [name for name, _ in plan(held).rows]
    assert "high-noise expert, 38 of 40 blocks in 8 bits" in names
    assert dict(plan(held).phases)["a block on its way to 8 bits, loading"] == sizes.block + block


def planner(
    facts: Facts, mesh: Mesh, gib: float, host_gib: float = 900, frames: int = 81
) -> Callable[[Rung], MemoryPlan]:
    spec, sizes = family(facts, frames)

    def plan_of(rung: Rung) -> MemoryPlan:
        return make_plan(
            spec, sizes, mesh, rung, BF16, FP16,
            on_gpu=True, available=int(gib * GIB), host_available=int(host_gib * GIB),
        )  # fmt: skip

    return plan_of


def chosen(facts: Facts, mesh: Mesh, gib: float, host_gib: float = 900) -> MemoryPlan:
    rungs = allowed(mesh, 1 if facts is TI2V_5B else 2, on_gpu=True)
    return choose(planner(facts, mesh, gib, host_gib), rungs, lambda number: number)[0]


def test_full_size_weights_are_the_known_64_gib() -> None:
    _, sizes = family(T2V_A14B)
    total = sizes.text + 2 * sizes.expert + sizes.vae
    print(f"text {sizes.text / GIB:.2f}, expert {sizes.expert / GIB:.2f}, VAE {sizes.vae / GIB:.2f} GiB")
    assert total / GIB == pytest.approx(64.0, abs=1.5)  # fp32 time MLPs, counted here, make the rest
    # By hand: 40 blocks x (8 x 5120^2 + 2 x 5120 x 13824) x 2 bytes, biases and the rest are small.
    assert sizes.blocks * sizes.block == pytest.approx(40 * (8 * 5120**2 + 2 * 5120 * 13824) * 2, rel=0.01)


def test_text_keys_and_values_are_half_of_156_gib_as_one_expert_has_them_at_a_time() -> None:
    rows = dict(planner(T2V_A14B, Mesh(), 79)("resident").rows)
    kv = rows["text keys and values (of one expert at a time)"]
    assert kv * 2 / GIB == pytest.approx(1.5625, abs=0.001)
    branch = dict(planner(T2V_A14B, Mesh(0, 2, 4), 79)("resident").rows)
    assert branch["text keys and values (of one expert at a time)"] * 2 == kv


def test_a_forward_at_full_size_takes_what_adding_up_by_hand_gives() -> None:
    """75,600 tokens, one row: beside q, k, v and attention's output there are x (twice) and its norm."""
    config = DiTConfig(5120, 13824, 40, 40)
    tokens = 21 * 45 * 80
    # Bytes a token and feature: x 4 + the first x 4, norm 2, packed qkv 6, q and k 4, output 2.
    by_hand = tokens * 5120 * (4 + 4 + 2 + 6 + 4 + 2)
    planned = denoising_bytes(config, tokens, 1, BF16)
    print(f"{planned / GIB:.2f} GiB, by hand {by_hand / GIB:.2f}")
    assert planned == pytest.approx(by_hand, rel=0.1)
    eighth = denoising_bytes(config, tokens // 8, 1, BF16)
    assert planned / 8 <= eighth < planned / 7


@pytest.mark.parametrize("mesh", [Mesh(0, 2, 4), Mesh(0, 1, 8), Mesh()])
def test_each_rung_is_taken_as_soon_as_it_fits_and_takes_no_more_than_the_one_before(mesh: Mesh) -> None:
    rungs = allowed(mesh, 2, on_gpu=True)
    totals = [planner(T2V_A14B, mesh, 0)(rung).total for rung in rungs]
    print(mesh.layout, {rung: f"{total / GIB:.1f} GiB" for rung, total in zip(rungs, totals, strict=True)})
    assert totals == sorted(totals, reverse=True)
    for total in totals:
        first = rungs[totals.index(total)]  # two rungs may take the same, where decoding takes the most
        assert chosen(T2V_A14B, mesh, total / GIB).rung == first
        assert chosen(T2V_A14B, mesh, (total + 4096) / GIB).rung == first


@pytest.mark.parametrize(
    ("mesh", "gib", "rungs"),
    [
        (Mesh(0, 2, 4), 78.5, ("resident",)),  # what an empty 80 GB card has free
        (Mesh(0, 1, 8), 78.5, ("resident",)),
        (Mesh(), 78.5, ("branches",)),  # both experts, text encoder and VAE stay
        (Mesh(), 140, ("resident",)),
        (Mesh(0, 2, 4), 47, ("shard",)),
        (Mesh(0, 2, 4), 31, ("shard",)),
        (Mesh(), 47, ("host",)),
    ],
)
def test_known_cards_hold_a14b(mesh: Mesh, gib: float, rungs: tuple[Rung, ...]) -> None:
    plan = chosen(T2V_A14B, mesh, gib)
    print(plan.table())
    assert plan.rung in rungs


def test_what_fits_nowhere_is_refused_with_tables() -> None:
    with pytest.raises(DoesNotFit) as caught:
        chosen(T2V_A14B, Mesh(), 24)
    words, tables = str(caught.value), caught.value.tables
    assert len(words.splitlines()) == 1
    assert "one expert in pinned host memory, exchanged at the boundary), and 24.000 GiB are free" in words
    assert "high-noise expert" in tables  # the first rung's table
    assert "one expert's blocks" in tables  # and the last one's
    with pytest.raises(DoesNotFit, match=r"of host memory 20\.000"):  # the GPU would do, the host would not
        chosen(T2V_A14B, Mesh(), 47, host_gib=20)


def test_a_5b_model_fits_a_24_gib_card() -> None:
    plan = chosen(TI2V_5B, Mesh(), 31)
    print(plan.table())
    assert plan.rung in ("resident", "branches", "text")


def test_an_images_encoding_is_part_of_the_plan() -> None:
    plan = planner(I2V_A14B, Mesh(), 140)("resident")
    assert dict(plan.phases)["activations, image encoding"] > GIB
    assert largest(family(I2V_A14B)[0])[0][0] * largest(family(I2V_A14B)[0])[0][1] >= 1280 * 720


def test_the_plans_weights_are_the_tiny_models_to_the_byte(
    tiny: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        pipeline = load_pipeline(tiny, device="cpu", dtype=BF16)

    def held(*models: torch.nn.Module) -> int:
        return sum(p.numel() * p.element_size() for model in models for p in model.parameters())

    assert pipeline.low is not None
    table = next(record.message for record in caplog.records if record.message.startswith("memory of"))
    print(table)
    entries = {
        "text encoder": held(pipeline.text_encoder),  # type: ignore[arg-type]
        "high-noise expert": held(pipeline.high),
        "low-noise expert": held(pipeline.low),
        "VAE": held(pipeline.vae),
    }
    for name, size in entries.items():
        assert f"{size / GIB:9.3f} GiB" in next(line for line in table.splitlines() if name in line)
    sizes = sizes_of_folder(tiny)
    assert (sizes.text, sizes.expert, sizes.vae) == tuple(
        entries[name] for name in ("text encoder", "low-noise expert", "VAE")
    )


def sizes_of_folder(folder: Path) -> Sizes:
    from engine.layout import find_layout

    layout = find_layout(folder)
    assert layout.low is not None
    return sizes_of(
        [layout.high.entries, layout.low.entries], layout.text.entries.values(), layout.vae.entries.values(),
        BF16, torch.float32,
    )  # fmt: skip


def test_planned_activations_are_those_of_a_real_forward_and_decode(pipeline: Pipeline) -> None:
    dit, vae = pipeline.spec.dit, pipeline.spec.vae
    grid = (6, 8, 12)  # 144 tokens
    latents = torch.randn(1, 16, *grid)
    with torch.inference_mode():
        text = pipeline.high.encode_text(torch.randn(2, dit.text_len, dit.text_dim))
        pipeline.high(latents, torch.tensor([[500]]), text)
        with LiveBytes() as live:
            pipeline.high(latents, torch.tensor([[500]]), text)
        denoising = live.peak
        with LiveBytes() as live:
            for _ in pipeline.vae.decode_chunks(latents[:, :, :4]):
                pass
    planned = (
        denoising_bytes(dit, math.prod(grid) // 4, 2, torch.float32),
        decoding_bytes(vae, (4, *grid[1:]), torch.float32),
    )
    print(f"denoising {denoising:,} planned {planned[0]:,}; decoding {live.peak:,} planned {planned[1]:,}")
    assert planned[0] == pytest.approx(denoising, rel=0.05)
    assert planned[1] == pytest.approx(live.peak, rel=0.05)


def test_live_bytes_count_what_lives_and_no_views() -> None:
    with LiveBytes() as live:
        a = torch.zeros(1000)
        b = a[:10].view(2, 5)
        assert live.now == 4000
        c = a + 1
        del a
        assert live.now == 8000  # b still holds it
        del b
        assert live.now == 4000
        c.add_(1)
    assert (live.now, live.peak) == (4000, 8000)


def test_a_model_that_is_too_large_is_refused_before_a_weight_is_read(
    tiny: Path, caplog: pytest.LogCaptureFixture
) -> None:
    came: list[int] = []
    with pytest.raises(DoesNotFit, match=r"rank 0 of 1 .* takes 0\.\d+ GiB"), caplog.at_level(logging.ERROR):
        load_pipeline(tiny, device="cpu", memory_limit=100_000, on_bytes=lambda *told: came.append(1))
    assert came == []
    assert re.search(r"text encoder[\s\S]*available +0\.000 GiB", caplog.text)


def test_a_lower_rung_is_never_silent(tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    long = shutil.copytree(tiny, tmp_path / "long")  # so long that denoising takes more than decoding
    reel = json.loads((long / "reel.json").read_text())
    (long / "reel.json").write_text(json.dumps(reel | {"max_frame_num": 1601}))
    with pytest.raises(DoesNotFit) as caught:
        load_pipeline(long, device="cpu", memory_limit=0)
    totals = [line.split() for line in caught.value.tables.splitlines() if line.startswith("  total")]
    resident, branches = (float(words[1]) for words in totals)
    assert branches < resident
    with caplog.at_level(logging.WARNING):
        pipeline = load_pipeline(long, device="cpu", memory_limit=int((resident - 0.001) * GIB))
    assert pipeline.branches_in_turn
    assert "guidance branches one after another, since everything resident would take" in caplog.text

"""Ranks in real processes over gloo against one rank: the same latents and pixels, whatever the layout.

The difference isn't 0: a rank multiplies matrices of fewer rows, which BLAS may sum in another order.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from engine.load import load_pipeline
from engine.parallel.frames import best_axis, stripes
from engine.parallel.mesh import choose_layout
from engine.pipeline import Pipeline
from engine.vae_blocks import WholeFrame
from tests.engine.lost_ranks import FULL, LIMIT_SECONDS, LOSSES, one_video
from tests.engine.oracle import relative
from tests.engine.ranks import (
    CHECKS,
    FUSED_GRID,
    GRIDS,
    IN_HALF,
    LAYOUTS,
    VAES,
    VARIANTS,
    cached_latents,
    case_latents,
    environment,
    fused_latents,
    fused_video,
    grid_name,
    make_checkpoint,
    random_vae,
    vae_inputs,
)

SECONDS = 400  # of wall time for all worlds together, of which two usual cores take 45
pytestmark = pytest.mark.timeout(SECONDS + 20)
WORLDS = {layout: world for world, layouts in LAYOUTS.items() for layout in layouts}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("eight-heads"))


@pytest.fixture(scope="module")
def alone(checkpoint: Path) -> Pipeline:
    """One rank that does everything."""
    return load_pipeline(checkpoint, device="cpu")


@pytest.fixture(scope="module")
def ranks(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the ranks of all worlds left behind."""
    folder = tmp_path_factory.mktemp("ranks")
    subprocess.run(
        [sys.executable, "-m", "tests.engine.worlds", str(checkpoint), str(folder)],
        env=environment(),
        timeout=SECONDS,
        check=True,
    )
    return folder


def words(folder: Path) -> str:
    return (folder / "words").read_text() if (folder / "words").exists() else ""


def found(ranks: Path, world: int) -> dict[str, Tensor]:
    """What rank 0 of a world saved; all ranks must have ended well."""
    codes = [line.split()[0] for line in (ranks / str(world) / "codes").read_text().splitlines()]
    assert codes == ["0"] * world, words(ranks / str(world))
    return load_file(ranks / str(world) / "found.safetensors")


def expect_equal(got: Tensor, expected: Tensor) -> None:
    error = relative(got, expected)
    print(f"relative error {error:.2e}, equal: {torch.equal(got, expected)}")
    assert error < 1e-5


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("layout", WORLDS)
def test_every_layout_makes_the_latents_of_one_rank(
    ranks: Path, alone: Pipeline, layout: str, grid: tuple[int, int, int]
) -> None:
    got = found(ranks, WORLDS[layout])[f"{layout} {grid_name(grid)}"]
    expect_equal(got, case_latents(alone, grid))


@pytest.mark.parametrize(
    ("layout", "variant"),
    [
        (layout, variant)
        for layout, world in WORLDS.items()
        for variant in VARIANTS[world]
        if not layout.endswith("x1")
    ],
)
def test_every_transport_and_overlap_makes_the_latents_of_one_rank(
    ranks: Path, alone: Pipeline, layout: str, variant: str
) -> None:
    expect_equal(found(ranks, WORLDS[layout])[f"{layout} {variant}"], fused_latents(alone))


@pytest.mark.parametrize("variant", VARIANTS[2])
def test_blocks_in_8_bits_use_every_transport_and_overlap(ranks: Path, alone: Pipeline, variant: str) -> None:
    expect_equal(found(ranks, 2)[f"1x2 {variant} 8bit"], case_latents(alone, FUSED_GRID))


@pytest.mark.parametrize("case", [*(f"{layout} cached" for layout in LAYOUTS[2]), "1x2 cached in turns"])
def test_every_layout_reuses_the_same_steps(ranks: Path, alone: Pipeline, case: str) -> None:
    got, expected = found(ranks, 2)[case], cached_latents(alone)
    assert min(expected[-3:].tolist()) > 0  # steps, guidances, self-attention
    assert torch.equal(got[-3:], expected[-3:])
    expect_equal(got[:-3], expected[:-3])


@pytest.mark.parametrize(("kind", "rows", "columns"), VAES)
@pytest.mark.parametrize("world", LAYOUTS)
def test_a_vae_in_stripes_makes_the_pixels_of_a_whole_one(
    ranks: Path, world: int, kind: str, rows: int, columns: int
) -> None:
    vae, (latents, video) = random_vae(kind), vae_inputs(kind, rows, columns)
    got, name = found(ranks, world), f"vae {kind} {rows}x{columns}"
    with torch.inference_mode():
        expect_equal(got[f"{name} latents"], vae.encode(video))
        whole = vae.decode(latents)
        expect_equal(got[f"{name} video"], whole)
        expect_equal(got[f"{name} fused video"], whole)
        if kind != IN_HALF:
            return
        in_half = fused_video(vae.half(), latents.half())
    # Half precision rounds the middle attention of a stripe otherwise than that of a whole frame.
    assert relative(got[f"{name} fp16 video"], whole) < 1.3 * relative(in_half, whole) < 1e-2


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("world", LAYOUTS)
def test_on_every_rank(ranks: Path, world: int, check: str) -> None:
    """What each rank checked by itself: see `tests.engine.ranks`."""
    found(ranks, world)
    for rank in range(world):
        assert (ranks / str(world) / f"{check}.{rank}").read_text() == "right"


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if "nothing" not in loss])
def test_a_lost_rank_is_noticed_and_the_others_go_on(ranks: Path, alone: Pipeline, loss: str) -> None:
    """By its death at once, by its silence after the limit. The group's rest forms a new group that works."""
    place = ranks / loss
    codes = [line.split()[0] for line in (place / "codes").read_text().splitlines()]
    # A hung rank is ended by its own watch; a third of the survivors has nobody to pair with.
    assert codes == ["0", "75" if loss == "hung" else "-9", "0", "0"], words(place)
    lost_at = float((place / "lost at").read_text())
    for rank in (0, 2, 3):
        at, _, why = (place / f"noticed.{rank}").read_text().partition(" ")
        print(f"rank {rank} noticed after {float(at) - lost_at:.2f} s: {why}")
        # Either the watch saw it, or a collective ran out of time, which can't tell whose fault it is.
        assert "rank 1 " in why or (loss == "hung" and "another rank failed or hangs" in why)
        assert float(at) - lost_at < (LIMIT_SECONDS + 5 if loss == "hung" else 5)
    expect_equal(load_file(place / "after.safetensors")["latents"], case_latents(alone, GRIDS[0]))


def test_a_full_rank_fails_its_job_alone_and_the_next_one_is_right(
    ranks: Path, alone: Pipeline, tmp_path: Path
) -> None:
    """Both ranks say which one and why, within the limit; a new group of them makes the right video."""
    place = ranks / FULL
    codes = [line.split()[0] for line in (place / "codes").read_text().splitlines()]
    assert codes == ["0", "0"], words(place)
    full_at = float((place / "full at").read_text())
    kinds = {0: ["RankLost", "RankLost"], 1: ["OutOfMemory", "RankLost"]}
    one_video(alone, tmp_path, "expected")
    expected = load_file(tmp_path / "expected.safetensors")["latents"]
    for rank in (0, 1):
        lines = [line.split(" ", 2) for line in (place / f"words.{rank}").read_text().splitlines()]
        print(f"rank {rank}: {lines}")
        assert [kind for _, kind, _ in lines] == ["RequestError", *kinds[rank]]
        # Rank 0 waits in a collective, until the limit at the most, for what rank 1 never sends.
        assert all(float(at) - full_at < LIMIT_SECONDS + 5 for at, *_ in lines[1:])
        assert "rank 1 ran out of memory" in lines[2][2]  # the old group refuses: its ranks are out of step
    assert "ran out of memory at denoising, step 1 of 3: tried to allocate 7 GiB" in lines[1][2]
    assert not (place / "first.safetensors").exists()
    for name in ("before", "after"):  # a refusal leaves the group whole, and a new group works
        expect_equal(load_file(place / f"{name}.safetensors")["latents"], expected)


def test_a_rank_that_cannot_stop_waiting_for_a_dead_one_ends(ranks: Path) -> None:
    """As a GPU's stream that awaits a dead rank's data would hold its process for good."""
    place = ranks / "killed where nothing times out"
    lines = [line.split() for line in (place / "codes").read_text().splitlines()]
    assert [code for code, _ in lines] == ["75", "-9", "75", "75"], words(place)
    lost_at = float((place / "lost at").read_text())
    assert all(float(at) - lost_at < 10 for _, at in lines)


def test_layouts() -> None:
    assert choose_layout(8, None, None) == (1, 8)
    assert choose_layout(4, None, None) == (1, 4)
    assert choose_layout(2, None, None) == (2, 1)
    assert choose_layout(16, None, None) == (2, 8)
    assert choose_layout(8, 1, None) == (1, 8)
    assert choose_layout(8, None, 8) == (1, 8)
    assert choose_layout(3, None, None) == (1, 3)
    assert choose_layout(1, None, None) == (1, 1)
    with pytest.raises(ValueError, match="3x2 doesn't fit 6 ranks"):
        choose_layout(6, 3, 2)
    with pytest.raises(ValueError, match="2x2 doesn't fit 8 ranks"):
        choose_layout(8, 2, 2)


def test_stripes() -> None:
    """The axis whose widest stripe is the least work, and rows where columns would be worse."""
    assert stripes(160, 8) == [20] * 8
    assert stripes(10, 4) == [3, 3, 2, 2]
    assert best_axis(90, 160, 8) == -1
    assert best_axis(10, 9, 5) == -2


def test_every_rank_gets_a_latent_where_one_axis_has_enough() -> None:
    for ranks in range(2, 9):
        for rows in range(1, 40):
            for columns in range(1, 40):
                if max(rows, columns) >= ranks:
                    size = columns if best_axis(rows, columns, ranks) == -1 else rows
                    assert min(stripes(size, ranks)) > 0, (rows, columns, ranks)


def test_one_rank_needs_no_stripes(alone: Pipeline) -> None:
    assert isinstance(alone.mesh.space(90, 160), WholeFrame)

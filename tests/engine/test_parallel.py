"""Two real processes over gloo against one: the same latents, whatever the layout.

The difference isn't 0: a rank multiplies matrices of fewer rows, which BLAS may sum in another order.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine.parallel.mesh import choose_layout
from engine.pipeline import Pipeline
from tests.engine.oracle import relative
from tests.engine.ranks import CASES, GRIDS, case_latents, environment

SECONDS = 120


@pytest.fixture(scope="module")
def two_ranks(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What rank 0 of two processes wrote, for every case; both processes must end well."""
    folder = tmp_path_factory.mktemp("ranks")
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.engine.ranks", str(tiny), str(folder)],
            env=environment(rank, folder),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=SECONDS)[0].decode() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(outputs)
    return folder


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("layout", ["1x2", "2x1"])
def test_two_ranks_make_the_latents_of_one(
    two_ranks: Path, pipeline: Pipeline, layout: str, grid: tuple[int, int, int]
) -> None:
    expected = case_latents(pipeline, grid)
    got = load_file(two_ranks / f"{layout}.safetensors")["x".join(map(str, grid))]
    error = relative(got, expected)
    print(f"relative error {error:.2e}, equal: {torch.equal(got, expected)}")
    assert error < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_on_every_rank(two_ranks: Path, case: str) -> None:
    """What each rank checked by itself: see `tests.engine.ranks`."""
    for rank in range(2):
        assert (two_ranks / f"{case}.{rank}").read_text() == "right"


def test_layouts() -> None:
    assert choose_layout(8, None, None) == (2, 4)
    assert choose_layout(8, 1, None) == (1, 8)
    assert choose_layout(8, None, 8) == (1, 8)
    assert choose_layout(3, None, None) == (1, 3)
    assert choose_layout(1, None, None) == (1, 1)
    with pytest.raises(ValueError, match="3x2 doesn't fit 6 ranks"):
        choose_layout(6, 3, 2)
    with pytest.raises(ValueError, match="2x2 doesn't fit 8 ranks"):
        choose_layout(8, 2, 2)

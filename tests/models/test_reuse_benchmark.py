"""What reuse and sparse attention are measured with: masks and shares by known cases, both whole commands."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import reuse, sparse
from engine.attention import sdpa
from engine.config import Work
from engine.tiny import make_tiny

TILES = sparse.Tiles((2, 8, 8))  # 8 tiles of 16 tokens


@pytest.fixture
def qkv() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(1, 128, 2, 8, generator=generator) for _ in range(3)]


def test_shares_are_those_of_a_whole_forward() -> None:
    # FLOP of 40 blocks by hand: attention's products, its projections, all products, the text's attention.
    attention = 4 * 75_600**2 * 5120 * 40
    projections = 8 * 75_600 * 5120**2 * 40
    others = 4 * 75_600 * 5120 * (5120 + 13_824 + 512) * 40
    whole = attention + projections + others
    assert reuse.attention_share(reuse.A14B, 75_600) == pytest.approx((attention + projections) / whole)
    assert sparse.products_share(75_600) == pytest.approx(attention / whole)
    assert whole == pytest.approx(6.5e15, rel=0.02)  # a forward's, as it was counted elsewhere


def test_a_reused_step_saves_all_and_reused_attention_its_share() -> None:
    works = [Work("x", 10, 10, 0, 0), Work("x", 20, 0, 0, 10)]
    assert reuse.saved(works, 0.8) == pytest.approx((10 + 8) / 40)


def test_tiles_and_their_means(qkv: list[torch.Tensor]) -> None:
    assert TILES.counts == (2, 2, 2)
    assert sparse.Tiles((5, 6, 9)).counts == (5, 2, 3)
    tile = TILES.of_tokens().view(2, 8, 8)
    assert tile[0, 3, 3] == 0
    assert tile[0, 3, 4] == 1
    assert tile[1, 4, 0] == 6
    x = qkv[0]
    mean = TILES.mean(x)
    assert torch.allclose(mean[0, 1, 6], x[0, TILES.of_tokens() == 6, 1].mean(0), atol=1e-6)


def test_near_tiles() -> None:
    empty = torch.empty(0)
    assert torch.equal(sparse.near(TILES, 0, 0)(empty, empty)[0, 0], torch.eye(8, dtype=torch.bool))
    assert sparse.near(TILES, 0, 1)(empty, empty).float().mean() == 0.5
    assert sparse.near(TILES, 1, 1)(empty, empty).all()


def test_tiles_of_the_most_mass_and_a_tile_itself(qkv: list[torch.Tensor]) -> None:
    q, k, _ = (x * 0.01 for x in qkv)
    of = TILES.of_tokens()
    q[:, of == 2] += 1.0
    k[:, of == 5] += 1.0  # what tile 2 looks at, and all others as good as nowhere
    k[:, of == 7] -= 1.0
    mask = sparse.by_mass(TILES, 0.25)(q, k)
    assert (mask.sum(-1) == 2).all()
    assert mask[0, :, 2].nonzero()[:, 1].tolist() == [2, 5, 2, 5]
    assert mask.diagonal(dim1=-2, dim2=-1).all()
    assert sparse.by_mass(TILES, 1.0)(q, k).all()


def test_masked_attention_sees_the_chosen_tiles_alone(qkv: list[torch.Tensor]) -> None:
    q, k, v = qkv

    def attention(density: float, first_steps: int = 0, first_blocks: int = 0) -> sparse.SparseAttention:
        return sparse.SparseAttention(TILES, sparse.by_mass(TILES, density), 2, 3, first_steps, first_blocks)

    whole = sdpa(q, k, v)
    assert torch.allclose(attention(1.0)(q, k, v), whole, atol=1e-5)
    alone = attention(0.125)
    own = TILES.of_tokens() == 3
    assert torch.allclose(alone(q, k, v)[:, own], sdpa(q[:, own], k[:, own], v[:, own]), atol=1e-5)
    assert alone.saved == 0.875
    edges = attention(0.125, first_steps=1, first_blocks=1)
    dense = [torch.equal(edges(q, k, v), whole) for _ in range(12)]  # two videos of three steps of two blocks
    assert dense == [True, True, True, False, True, False] * 2
    assert edges.saved == pytest.approx(4 / 12 * 0.875)


def test_the_whole_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)  # other tests go on with theirs
    monkeypatch.setattr(reuse, "SETTINGS", {"all": {"attention_threshold": 1e9, "first": 1}})
    model = make_tiny(tmp_path / "model")
    facts = json.loads((model / "reel.json").read_text())
    (model / "reel.json").write_text(json.dumps(facts | {"sizes": ["64*64"], "sampling_steps": 4}))
    command = ["--model", str(model), "--count", "1", "--frame-num", "5", "--side", "64"]
    reuse.main([*command, "--device", "cpu", "--out", str(tmp_path / "reuse.json")])
    found = json.loads((tmp_path / "reuse.json").read_text())["settings"]["all"]
    assert found["attention reused"] >= 1
    assert found["saved"] == pytest.approx(found["attention reused"] / 4 * 0.815, abs=0.001)
    assert 10 < found["psnr_db"] < 100
    sparse.main([*command, "--densities", "1,0.5", "--first-steps", "1", "--out", str(tmp_path / "s.json")])
    rows = json.loads((tmp_path / "s.json").read_text())
    assert rows["by mass, 100%"]["psnr_db"] > 35  # in bf16
    assert rows["by mass, 100%"]["attention saved"] == 0
    # Of 4 steps and 2 blocks the first each are dense; half of the rest is left out.
    assert rows["by mass, 50%"]["attention saved"] == pytest.approx(3 / 4 / 2 / 2, abs=0.001)
    assert rows["by mass, 50%"]["psnr_db"] < rows["by mass, 100%"]["psnr_db"]

"""Which 8-bit attention is chosen: never one that is wrong, fails, or lost; cuDNN's scales by emulation."""

import logging

import pytest
import torch
from torch import Tensor

from benchmarks import _tune_attention
from benchmarks._tune_attention import eight_entry, eight_fault
from kernels import tables
from kernels.attention import reference as exact
from kernels.attention_8bit import choice as chosen
from kernels.attention_8bit import cudnn_fp8, reference
from kernels.attention_8bit.choice import CUDNN, OURS, choice, probe, table_key, works
from tests.kernels.check import relative_error

CPU = torch.device("cpu")
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def told(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, str]]:
    """The table's entries; ours is its emulation, as Triton's interpreter would take minutes."""
    table: dict[str, dict[str, str]] = {}
    monkeypatch.setitem(chosen.BACKENDS, OURS, reference.attention)
    monkeypatch.setattr(
        tables, "setting", lambda op, key, device, default: default | table.get(f"{op} {key}", {})
    )
    for cached in (choice, works):
        cached.cache_clear()
    yield table
    for cached in (choice, works):
        cached.cache_clear()


def win(table: dict[str, dict[str, str]], name: str) -> None:
    table[f"{chosen.TABLE} {table_key(32, 500)}"] = {"backend": name}


def pick(tokens: int = 500) -> str:
    return choice(BF16, 32, tokens, CPU)


def right(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return exact.attention(q, k, v).to(q.dtype)


def test_without_an_entry_it_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(chosen.BACKENDS, CUDNN, lambda *_: pytest.fail("nobody asked for it"))
    assert pick() == OURS


def test_the_tables_winner_is_taken_for_its_shape(told: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(chosen.BACKENDS, CUDNN, right)
    win(told, CUDNN)
    assert (pick(), pick(512), pick(513), pick(256)) == (CUDNN, CUDNN, OURS, OURS)


def test_a_wrong_or_failing_winner_is_passed_over(
    told: dict, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise ImportError("No module named 'cudnn'")

    def wrong(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return right(q, k, v) * 1.09

    def holes(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return right(q, k, v).index_fill(1, torch.tensor([5]), float("nan"))

    win(told, CUDNN)
    for backend, words in (
        (fails, "No module"),
        (wrong, "relative error 0.09"),
        (holes, "relative error nan"),
    ):
        for cached in (choice, works):
            cached.cache_clear()
        monkeypatch.setitem(chosen.BACKENDS, CUDNN, backend)
        caplog.clear()
        assert [pick(tokens) for tokens in (500, 510)] == [OURS, OURS]
        warnings = [line.message for line in caplog.records if line.levelno == logging.WARNING]
        assert len(warnings) == 1, "one line, though two shapes asked"
        assert words in warnings[0]
    win(told, "a backend of a later version")
    choice.cache_clear()
    assert pick() == OURS


def test_nothing_right_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(chosen.BACKENDS, OURS, lambda q, k, v: q * 0)
    with pytest.raises(RuntimeError, match="no 8-bit attention gives right results for head 32"):
        pick()


def test_the_slower_one_does_not_reach_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    assert eight_entry({OURS: 20.0, CUDNN: 18.4}) == {"backend": CUDNN, "ours_ms": 20.0, "cudnn_ms": 18.4}
    assert eight_entry({OURS: 20.0, CUDNN: 21.0})["backend"] == OURS
    assert eight_entry({OURS: 20.0, CUDNN: 19.7})["backend"] == OURS  # within what bursts differ by
    assert eight_entry({CUDNN: 30.0}) == {"backend": CUDNN, "cudnn_ms": 30.0}  # ours gave wrong numbers
    q, k, v = torch.randn(3, 1, 70, 2, 32).to(BF16)
    monkeypatch.setitem(chosen.BACKENDS, CUDNN, right)
    assert eight_fault(CUDNN, right, q, k, v) == ""
    # Right in the probe and wrong at the real length, and the other way round.
    assert "relative error" in eight_fault(CUDNN, lambda q, k, v: q * 0, q, k, v)
    monkeypatch.setitem(chosen.BACKENDS, CUDNN, lambda q, k, v: q * 0)
    assert "relative error" in eight_fault(CUDNN, right, q, k, v)
    assert "AttributeError" in eight_fault(CUDNN, lambda q, k, v: q.no_such, q, k, v)


def test_ours_passes_its_probe_and_cudnn_is_not_here() -> None:
    assert probe(OURS, BF16, 32, CPU) < chosen.TOLERANCE
    with pytest.raises((ImportError, RuntimeError, AssertionError)):
        probe(CUDNN, BF16, 32, CPU)


def emulated(given: cudnn_fp8.Operands) -> Tensor:
    """What the library documents of `sdpa_fp8`: each operand times its scale, P and the output rounded."""
    q, k, v = (data.float().transpose(1, 2) for data in (given.q, given.k, given.v))
    scores = q @ k.transpose(-1, -2) * (given.of_q * given.of_k * q.shape[-1] ** -0.5)
    p = torch.exp(scores - scores.amax(-1, keepdim=True))
    rounded = (p * given.to_p).to(cudnn_fp8.E4M3).float() * given.of_p
    out = rounded @ v * given.of_v / p.sum(-1, keepdim=True)
    assert (out * given.to_out).abs().max() <= cudnn_fp8.LARGEST
    return (out * given.to_out).to(cudnn_fp8.E4M3).transpose(1, 2)


@pytest.mark.parametrize(("queries", "keys", "size"), [(70, 90, 1.0), (33, 1, 300.0), (5, 64, 0.0)])
def test_the_scales_given_to_cudnn_add_up(
    queries: int, keys: int, size: float, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    q = torch.randn(2, queries, 3, 32).to(BF16)
    k = (torch.randn(2, keys, 3, 32) + 8 * torch.randn(3, 32)).to(BF16)
    v = (size * torch.randn(2, keys, 3, 32)).to(BF16)
    monkeypatch.setattr(cudnn_fp8, "run", emulated)
    got = cudnn_fp8.attention(q, k, v)
    assert (got.dtype, got.shape) == (q.dtype, q.shape)
    want = exact.attention(q, k, v)
    assert relative_error(got, want) < 0.1 if size else not got.any()
    given = cudnn_fp8.operands(q, k, v)
    assert given.q.is_contiguous()
    assert {x.shape for x in list(vars(given).values())[3:]} == {(1, 1, 1, 1)}


def test_the_table_gets_the_fastest_right_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile with a wrong result is no candidate, however fast."""
    from kernels.attention_8bit import triton

    seen: list[triton.Tile] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, tile: triton.Tile) -> Tensor:
        seen.append(tile)
        return right(q, k, v) * (1.0 if tile.warps == 8 else 2.0)

    monkeypatch.setattr(triton, "attention", attend)
    monkeypatch.setattr(chosen, "usual", lambda device: OURS)
    monkeypatch.setattr(_tune_attention, "randn", lambda *shape: torch.randn(3, 1, 40, 1, 128))
    monkeypatch.setattr(
        _tune_attention, "burst", lambda call, *_: float(call.args[3].n + call.args[3].stages)
    )
    entries = _tune_attention.tune_tiles_8bit(quick=True)
    assert len(seen) == len(_tune_attention.EIGHT_TILES)
    assert entries == {"attention_8bit": {"128": {"m": 128, "n": 64, "warps": 8, "stages": 4, "ms": 68.0}}}

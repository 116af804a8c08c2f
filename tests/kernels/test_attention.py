"""The choice of an attention backend: a wrong or broken one is passed over."""

import logging
import sys
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from benchmarks._tune_attention import attention_entry
from kernels import attention, tables
from kernels.attention import backends, reference
from kernels.attention.settled import Settled
from kernels.attention.waves import Tile, pick
from tests.kernels.check import relative_error
from tests.kernels.scores import JUMPS, growing, jumping, never_wrong


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_backend_is_right(seed: int, dtype: torch.dtype):
    assert attention.probe(("sdpa", {}), dtype, 24, torch.device("cpu"), tokens=96) < 1e-2


def test_reference_is_softmax(seed: int):
    q, k, v = torch.randn(3, 2, 7, 3, 8, dtype=torch.float64)
    want = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    assert relative_error(reference.attention(q, k, v), want) < 1e-12


@pytest.mark.parametrize("fault", ["missing", "wrong", "nan"])
def test_a_bad_backend_is_passed_over(
    seed: int, fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def bad(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, object]) -> torch.Tensor:
        if fault == "missing":
            raise ImportError("No module named 'flash_attn'")
        return backends.sdpa(q, k, v, {}) * (1.05 if fault == "wrong" else float("nan"))

    monkeypatch.setitem(backends.BACKENDS, "flash4", bad)
    with caplog.at_level(logging.INFO):
        works = attention._works(("flash4", {}), torch.bfloat16, 24, torch.device("cpu"))
    assert not works
    assert "passed over" in caplog.text


def test_cpu_uses_torch(seed: int):
    q, k, v = torch.randn(3, 1, 5, 2, 8)
    assert torch.equal(attention.attention(q, k, v), backends.sdpa(q, k, v, {}))


@pytest.mark.parametrize(
    ("tokens", "by"), [(15, 0.0), (79, 0.0), (80, 150.0), (777, 30.0), (777, 600.0), (777, 2000.0)]
)
def test_a_settled_maximum_changes_nothing(seed: int, tokens: int, by: float):
    """Scores that grow by up to 2,000 over the keys, their e^ far beyond fp32, but not at once."""
    q, k, v = growing(tokens, 2, 64, by)
    scores = torch.einsum("blhk,bthk->bhlt", q.double(), k.double()) / 8
    want = reference.attention(q, k, v)
    plain = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    got = reference.settled(q, k, v, block=16)
    assert tokens < 777 or scores.amax() > 0.9 * by
    assert relative_error(got, want) <= max(1.1 * relative_error(plain, want), 4e-3)


@pytest.fixture(params=[False, True], ids=["denormals", "flushed"])
def denormals(request: pytest.FixtureRequest):
    """With numbers under 2^-126, and without, as a GPU's fast exp2 has it."""
    torch.set_flush_denormal(request.param)
    yield
    torch.set_flush_denormal(False)


@pytest.mark.parametrize(("heights", "lost"), JUMPS)
def test_what_a_settled_maximum_can_not_hold_is_never_a_wrong_number(
    seed: int, denormals: None, heights: tuple[float, float | None], lost: bool
):
    """Keys in later blocks that some queries see far above all before them."""
    q, k, v = jumping(96, 2, 64, *heights)
    never_wrong(reference.settled(q, k, v, block=16), reference.attention(q, k, v), lost)


def test_the_switch_says_whether_a_result_can_change():
    switch = Settled()
    switch.begin()
    assert not switch.suspect, "no kernel asked, so none can be at fault"
    assert switch.ask()
    assert switch.suspect
    switch.begin()
    assert not switch.suspect, "none asked since"
    assert switch.ask()
    switch.forbid()
    assert not switch.suspect
    assert not switch.ask()
    switch.trust()
    assert switch.ask()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("allowed", [True, False])
def test_only_bf16_takes_a_settled_maximum(
    dtype: torch.dtype, allowed: bool, monkeypatch: pytest.MonkeyPatch
):
    """P of 2^-32 is nothing in fp16."""
    used: list[str] = []
    library = ModuleType("flash_attn.cute.interface")
    library._flash_attn_fwd = lambda q, k, v, **options: (options,)  # type: ignore[attr-defined]
    patch = ModuleType("kernels.attention.flash4_softmax")
    patch.using = lambda kind: nullcontext(used.append(kind))  # type: ignore[attr-defined]
    for module in (ModuleType("flash_attn"), ModuleType("flash_attn.cute"), library, patch):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(attention, "flash4_softmax", patch, raising=False)
    monkeypatch.setattr(backends, "settled", Settled(allowed=allowed))
    q = torch.zeros(1, 8, 1, 16, dtype=dtype)
    options = {"tile_mn": [192, 80], "softmax": "settled"}
    assert backends.flash4(q, q, q, options) == {"tile_mn": (192, 80)}
    assert used == ["settled" if allowed and dtype is torch.bfloat16 else "lazy"]


HIGH = Tile({"tile_mn": [192, 80]}, 18.5, heads=5, queries=75600)
USUAL = Tile({}, 20.3, heads=5, queries=75600)


@pytest.mark.parametrize(
    ("heads", "queries", "best"),
    [
        (5, 75600, HIGH),  # A14B at 720p, a share of 8: 14.9 waves of 132
        (40, 75600, HIGH),
        (3, 27280, USUAL),  # 5B: 3.25 waves that take 4, against 4.9
        (1, 132 * 128, USUAL),  # one full wave
        (1, 132 * 192, HIGH),
        (2, 100, USUAL),
    ],
)
def test_the_tile_whose_last_wave_is_fullest(heads: int, queries: int, best: Tile):
    assert pick((HIGH, USUAL), heads, queries, 132) == best.options


def test_each_call_takes_the_tile_of_its_shape(monkeypatch: pytest.MonkeyPatch):
    taken: list[dict[str, object]] = []
    device = torch.device("cpu")

    def backend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, object]
    ) -> torch.Tensor:
        taken.append(options)
        return q

    monkeypatch.setitem(backends.BACKENDS, "sdpa", backend)
    monkeypatch.setattr(attention, "tiles_of", lambda *of: (HIGH, USUAL))
    card = SimpleNamespace(multi_processor_count=2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    attend = attention.choose("self", torch.bfloat16, 8, device)
    for batch, length in ((1, 192), (2, 192), (1, 128), (2, 128)):
        q = torch.zeros(batch, length, 2, 8, dtype=torch.bfloat16)
        attend(q, q, q)
    assert taken == [HIGH.options, HIGH.options, USUAL.options, USUAL.options]


def test_a_gpus_tiles_are_those_that_pass_the_probe(monkeypatch: pytest.MonkeyPatch):
    device = torch.device("cuda", 0)
    good, bad = {"tile_mn": [192, 80]}, {"tile_mn": [64, 64]}
    entry = {"backend": "flash4", "options": good, "ms": 2.0, "heads": 2, "queries": 9}
    entry["tiles"] = [{"options": good, "ms": 2.0}, {"options": bad, "ms": 1.0}]
    monkeypatch.setattr(tables, "setting", lambda op, key, device, default: entry)
    monkeypatch.setattr(attention, "_works", lambda choice, *rest: choice[1] is not bad)
    attention._tiles.cache_clear()
    try:
        found = attention.tiles_of(("flash4", good), "self", torch.bfloat16, 128, device)
        assert [(t.options, t.ms, t.heads, t.queries) for t in found] == [(good, 2.0, 2, 9)]
        assert attention.tiles_of(("cudnn", {}), "self", torch.bfloat16, 128, device) == ()
    finally:
        attention._tiles.cache_clear()


def test_the_tuner_keeps_the_fastest_of_each_height():
    def timed(options: dict[str, object], ms: float, backend: str = "flash4") -> dict[str, object]:
        return {"backend": backend, "options": options, "ms": ms}

    wide, narrow = {"tile_mn": [192, 80]}, {"tile_mn": [128, 176]}
    rows = [timed({}, 5.0), timed(wide, 3.0), timed({"tile_mn": [192, 64]}, 4.0), timed(narrow, 4.5)]
    entry = attention_entry([*rows, timed({}, 9.0, "cudnn")], heads=5, queries=100)
    assert (entry["backend"], entry["options"], entry["ms"]) == ("flash4", wide, 3.0)
    assert entry["tiles"] == [{"options": wide, "ms": 3.0}, {"options": narrow, "ms": 4.5}]
    assert (entry["heads"], entry["queries"], len(entry["others"])) == (5, 100, 5)
    other = attention_entry([timed({}, 1.0, "cudnn"), *rows], heads=5, queries=100)
    assert "tiles" not in other, "a library's one kernel"

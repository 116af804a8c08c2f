"""The choice of an attention backend: a wrong or broken one is passed over."""

import logging
import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from kernels import attention
from kernels.attention import backends, reference
from kernels.attention.settled import Settled
from tests.kernels.check import relative_error
from tests.kernels.scores import growing, jumping


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


@pytest.mark.parametrize(("jump", "lost"), [(60.0, False), (200.0, True), (3e4, True)])
def test_what_a_settled_maximum_can_not_hold_is_never_a_wrong_number(seed: int, jump: float, lost: bool):
    """One key in a later block that some queries see far above all others."""
    q, k, v = jumping(96, 2, 64, jump)
    got, want = reference.settled(q, k, v, block=16), reference.attention(q, k, v)
    assert relative_error(got[:, 1::3], want[:, 1::3]) < 5e-3
    assert relative_error(got[:, 2::3], want[:, 2::3]) < 5e-3
    if lost:
        assert got[:, ::3].isnan().all()
    else:
        assert relative_error(got[:, ::3], want[:, ::3]) < 5e-3


def test_the_switch_says_whether_a_result_can_change():
    switch = Settled()
    assert not switch.give_up(), "no kernel asked, so none can be at fault"
    assert switch.ask()
    assert switch.give_up()
    assert not switch.ask()
    assert not switch.give_up()
    switch.trust()
    assert switch.ask()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("allowed", [True, False])
def test_only_bf16_takes_a_settled_maximum(
    dtype: torch.dtype, allowed: bool, monkeypatch: pytest.MonkeyPatch
):
    """P of 2^-32 is nothing in fp16."""
    used: list[tuple[str, int]] = []
    library = ModuleType("flash_attn.cute.interface")
    library._flash_attn_fwd = lambda q, k, v, **options: (options,)  # type: ignore[attr-defined]
    patch = ModuleType("kernels.attention.flash4_softmax")
    patch.use = lambda kind, stages: used.append((kind, stages))  # type: ignore[attr-defined]
    for module in (ModuleType("flash_attn"), ModuleType("flash_attn.cute"), library, patch):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(attention, "flash4_softmax", patch, raising=False)
    monkeypatch.setattr(backends, "settled", Settled(allowed=allowed))
    q = torch.zeros(1, 8, 1, 16, dtype=dtype)
    options = {"tile_mn": [192, 80], "softmax": "settled", "stages": 4}
    assert backends.flash4(q, q, q, options) == {"tile_mn": (192, 80)}
    assert used == [("settled" if allowed and dtype is torch.bfloat16 else "lazy", 4)]

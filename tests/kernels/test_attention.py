"""The choice of an attention backend: a wrong or broken one is passed over."""

import logging

import pytest
import torch
import torch.nn.functional as F

from kernels import attention
from kernels.attention import backends, reference
from tests.kernels.check import relative_error


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

"""The block benchmark's contestants on a CPU: all compute the same block, from the same inputs."""

import copy
import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pytest
import torch

from benchmarks import _variants as variants
from benchmarks import block, picture
from benchmarks._measure import Sustained
from engine import fused
from engine.config import DiTConfig
from kernels.norm_modulate import Norm
from tests.kernels.check import relative_error


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A model of 4 heads; torch.compile gives back what it is given."""
    config = DiTConfig(dim=96, ffn_dim=160, num_heads=4, num_layers=1, text_dim=32, text_len=7)
    monkeypatch.setitem(variants.CONFIGS, "tiny", config)
    monkeypatch.setitem(variants.GRIDS, ("tiny", "small"), (3, 2, 4))
    monkeypatch.setattr(torch, "compile", lambda function: function)
    with torch.no_grad():
        yield


def outputs(inputs: variants.Inputs) -> dict[str, torch.Tensor]:
    """The residual stream after the block, by contestant; ours without the branch that comes before."""
    plain = variants.library("sdpa")
    stream = fused.Stream(inputs.x)
    sequence = variants.own_sequence(inputs)
    variants.run_fused(inputs, stream, sequence)
    zero = torch.zeros(1, 1, inputs.x.shape[-1])
    stream.read(Norm(zero, zero, 1e-6), torch.bfloat16)
    return {
        "official": variants.official(inputs, plain)(),
        "compiled": variants.compiled(inputs, plain, plain)(),
        "ours": stream.x_BLD,
    }


@pytest.mark.parametrize("share", [1, 2])
def test_all_contestants_compute_the_same_block(tiny: None, share: int) -> None:
    inputs = variants.Inputs(variants.Share("tiny", "small", share), device="cpu")
    exact_inputs = copy.copy(inputs)
    exact_inputs.block = copy.deepcopy(inputs.block).float()
    sequence = variants.own_sequence(inputs)
    text = (inputs.text[0].float(), inputs.text[1].float())
    exact_inputs.received = tuple(x.float() for x in inputs.received)  # type: ignore[assignment]
    sequence.inputs = exact_inputs
    exact = exact_inputs.block(inputs.x, inputs.e, 0, inputs.rope, text, sequence, inputs.share.total)
    for name, got in outputs(inputs).items():
        error = relative_error(got - inputs.x, exact - inputs.x)
        assert error < 1e-2, f"{name}: {error}"


@pytest.mark.parametrize("share", [1, 4])
def test_the_timed_steps_run(tiny: None, share: int) -> None:
    """Ours takes a pending branch in and leaves its own last one; the floor does its products."""
    inputs = variants.Inputs(variants.Share("tiny", "small", share), device="cpu")
    torch.manual_seed(1)
    step = variants.ours(inputs)
    torch.manual_seed(1)
    branch = torch.randn_like(inputs.x).bfloat16()  # what `ours` drew
    first, again = step(), step()
    assert isinstance(first, torch.Tensor)
    assert first.shape == (1, 24 // share, 96)
    assert torch.equal(first, again)  # the inputs are as they were
    assert relative_error(first, branch) > 0.5
    stream = fused.Stream(inputs.x)
    stream.add(branch, inputs.e[:, :, 5].contiguous())
    variants.run_fused(inputs, stream, variants.own_sequence(inputs))
    assert torch.equal(first, stream.pending)
    attend = variants.library("sdpa")
    variants.floor(inputs, attend, attend)()


def figures(ms: float) -> dict[str, Any]:
    parts = {"attention": ms * 0.7, "products": ms * 0.25}
    return asdict(Sustained(ms, parts, 100, 20.0, 1400.0, 699.0))


def report(fa2_ms: float) -> dict[str, Any]:
    names = {"official, FlashAttention-2": fa2_ms, "official, cuDNN": 44.0, "ours": 30.0}
    names["compiled, our attention choice"] = 32.0
    share = variants.Share("A14B", "720p", 8)
    return {
        "share": asdict(share) | {"tokens": share.tokens, "heads": share.heads},
        "checks": ["checked"],
        "results": {name: figures(ms) for name, ms in names.items()},
    }


def test_the_table_has_ratios_only_where_the_baseline_is_what_an_h100_gives() -> None:
    good = block.table(report(60.5), "NVIDIA H100 80GB HBM3")
    assert "| ours | 30.00 | 2.02 x | +6.7 % |" in good
    bad = block.table(report(70.0), "NVIDIA H100 80GB HBM3")
    assert "no ratio is printed" in bad
    assert " x |" not in bad
    assert "2.33 x" in block.table(report(70.0), "NVIDIA H200")


def test_the_picture_is_drawn() -> None:
    drawn = picture.draw(report(60.0), "NVIDIA H100 80GB HBM3")
    # Four contestants, two kinds of kernels each, and nothing idle.
    assert len(ElementTree.fromstring(drawn).findall(".//{*}title")) == 8
    assert json.dumps(report(60.0))

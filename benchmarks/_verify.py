"""Checks that come before any figure: a benchmark prints nothing about an op whose result is wrong."""

import copy

import torch
from torch import Tensor

from benchmarks._variants import Inputs, Share, ShareSequence, library, own_sequence, run_fused
from engine import fused
from kernels.attention import choose, reference
from kernels.norm_modulate import Norm


class WrongResult(RuntimeError):
    """An op's result is further from fp64 than plain torch in bf16 plus a tenth: no figure is printed."""


def relative_error(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want|; NaN if any value is NaN."""
    return float((got.double() - want.double()).norm() / want.double().norm())


def sampled_error(got: Tensor, q: Tensor, k: Tensor, v: Tensor, rows: int = 64) -> float:
    """Relative error of attention's output at its real length to fp64, on a sample of its queries."""
    sample = torch.linspace(0, q.shape[1] - 1, rows, device=q.device).long()
    return relative_error(got[:, sample], reference.attention(q[:, sample], k, v))


def require(what: str, ours: float, theirs: float) -> str:
    """A line for the report, or WrongResult (also for NaN)."""
    if not ours <= 1.1 * theirs:
        raise WrongResult(f"{what}: relative error {ours:.3g}, plain torch in bf16 has {theirs:.3g}")
    return f"{what}: relative error {ours:.3g} (plain torch in bf16: {theirs:.3g})"


def check_attention(share: Share, rows: int = 64) -> list[str]:
    """The chosen attention at its real length, on a sample of queries against fp64."""
    device, head = torch.device("cuda"), share.config.head_dim
    lines = []
    for kind, keys, heads in (
        ("self", share.total, share.heads),
        ("cross", share.config.text_len, share.config.num_heads),
    ):
        q = torch.randn(1, share.tokens if kind == "cross" else share.total, heads, head, device=device)
        k, v = torch.randn(2, 1, keys, heads, head, device=device)
        q, k, v = (x.bfloat16() for x in (q, k, v))
        sample = torch.randint(q.shape[1], (rows,), device=device)
        want = reference.attention(q[:, sample], k, v)
        got = choose(kind, torch.bfloat16, head, device)(q, k, v)[:, sample]
        plain = library("flash2")(q, k, v)[:, sample]
        lines.append(require(f"{kind}-attention", relative_error(got, want), relative_error(plain, want)))
    return lines


def check_block(model: str) -> str:
    """The fused block and the plain one, both bf16, against the plain one in fp32, on a short sequence."""
    inputs = Inputs(Share(model, "check", 1))
    exact_block = copy.deepcopy(inputs.block).float()
    sequence, length = own_sequence(inputs), inputs.share.total
    exact_sequence = ShareSequence(inputs, library("sdpa"), library("sdpa"))
    with torch.no_grad():
        stream = fused.Stream(inputs.x)
        run_fused(inputs, stream, sequence)
        zero = torch.zeros(1, 1, inputs.x.shape[-1], device=inputs.device)
        stream.read(Norm(zero, zero, 1e-6), torch.bfloat16)
        plain = inputs.block(inputs.x, inputs.e, 0, inputs.rope, inputs.text, sequence, length)
        text = (inputs.text[0].float(), inputs.text[1].float())
        exact = exact_block(inputs.x, inputs.e, 0, inputs.rope, text, exact_sequence, length)
    change = exact - inputs.x
    return require(
        f"{model} block",
        relative_error(stream.x_BLD - inputs.x, change),
        relative_error(plain - inputs.x, change),
    )

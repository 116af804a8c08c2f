"""The block's contestants in 8 bits: the engine's own, by each attention, the floor, and each part alone.

They stand beside those of `benchmarks._variants`, over the same weights and inputs of one share.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import cast

import torch
from torch import Tensor

from benchmarks._measure import Step
from benchmarks._variants import Attend, Inputs, ShareSequence, own_sequence, run_fused
from engine import fused
from engine.dit import DiT
from engine.dit_block import Block
from engine.eight_bit import PRODUCTS, EightBitBlocks, Switch, Weights
from engine.kept_attention import KeptAttention
from kernels import attention_8bit, fp8_gemm, gemm
from kernels.attention import choose
from kernels.fp8_gemm import Rows

LAYERS = ("self_attn.o", "cross_attn.q", "cross_attn.o", "ffn.0", "ffn.2")  # beside q, k and v, which are one


def backends(device: torch.device) -> dict[str, Attend]:
    """8-bit self-attentions by name; on a CPU the emulation of ours alone."""
    if device.type != "cuda":
        return {"emulation": attention_8bit.attention}
    from kernels.attention_8bit.choice import BACKENDS

    return dict(BACKENDS)


def chosen(inputs: Inputs) -> str:
    """The backend that the engine takes for the share's keys. RuntimeError where none is right."""
    if inputs.device.type != "cuda":
        return "emulation"
    from kernels.attention_8bit.choice import choice

    return choice(torch.bfloat16, inputs.share.config.head_dim, inputs.share.total, inputs.device)


def engines(inputs: Inputs) -> tuple[ShareSequence, EightBitBlocks]:
    """The share and the block as the engine runs `8bit`: its switch and attention, weights kept."""
    own = own_sequence(inputs)
    switch = Switch(own.attend)
    return ShareSequence(inputs, switch, own.cross), kept_weights(inputs, switch)


def by_backend(inputs: Inputs, attend: Attend) -> tuple[ShareSequence, EightBitBlocks]:
    """The same by one attention, whatever the engine would choose."""
    sequence = ShareSequence(inputs, attend, own_sequence(inputs).cross)
    return sequence, kept_weights(inputs, Switch(attend))


def kept_weights(inputs: Inputs, switch: Switch) -> EightBitBlocks:
    """The block's runner with its weights quantised already."""
    blocks = EightBitBlocks(switch, keep_weights=True)
    blocks.weights(inputs.block)
    return blocks


@contextmanager
def in_bits(block: Block, blocks: EightBitBlocks | None) -> Iterator[None]:
    """While the block computes in 8 bits; None: as it is."""
    block.eight = blocks  # type: ignore[assignment]
    try:
        yield
    finally:
        block.eight = None  # type: ignore[assignment]


def eight_bit(
    inputs: Inputs, sequence: ShareSequence, blocks: EightBitBlocks, reuse_attention: bool = False
) -> Step:
    """The 8-bit block between two others, as `_variants.ours`.

    With `reuse_attention` it takes a kept self-attention, as a step of `8bit-cache` may.
    """
    gate = inputs.e[:, :, 5].contiguous()
    branch = torch.randn_like(inputs.x).bfloat16()
    kept = KeptAttention()
    expert = cast(DiT, SimpleNamespace(blocks=[inputs.block]))

    def run() -> Tensor:
        stream = fused.Stream(inputs.x)
        stream.add(branch, gate)
        with in_bits(inputs.block, blocks):
            run_fused(inputs, stream, sequence)
        assert stream.pending is not None
        return stream.pending

    def reusing() -> Tensor:
        with kept.used(expert, reusing=True):
            return run()

    if not reuse_attention:
        return run
    with kept.used(expert, reusing=False):
        run()
    return reusing


class Products:
    """The block's six matrix products, each over operands of its own that are there already."""

    def __init__(self, inputs: Inputs) -> None:
        block, config, tokens = inputs.block, inputs.share.config, inputs.share.tokens
        self.wide, self.deep = (
            torch.randn(1, tokens, n, device=inputs.device).bfloat16() for n in (config.dim, config.ffn_dim)
        )
        layers = [block.get_submodule(name) for name in LAYERS]
        self.matrices: list[tuple[Tensor, Tensor]] = [
            fused.packed_qkv(block.self_attn),
            *((layer.get_parameter("weight"), layer.get_parameter("bias")) for layer in layers),
        ]
        self._block = block

    def _inputs(self) -> list[Tensor]:
        return [self.wide] * 5 + [self.deep]

    def plain(self) -> Step:
        """In bf16, by cuBLAS with the bias in the epilogue."""
        calls = [(x, *matrix) for x, matrix in zip(self._inputs(), self.matrices, strict=True)]

        def step() -> list[Tensor]:
            return [gemm.reference.linear(*call) for call in calls]

        return step

    def eight_bit(self) -> Step:
        """In e4m3 by `torch._scaled_mm`, a scale a row; quantising them is not counted."""
        weights = Weights.of(self._block)
        wide, deep = fp8_gemm.quantize_rows(self.wide), fp8_gemm.quantize_rows(self.deep)
        order = (weights.qkv, weights.o, weights.cross_q, weights.cross_o, weights.up, weights.down)
        calls = [
            (x, cast(Rows, weight), bias)
            for x, weight, (_, bias) in zip([wide] * 5 + [deep], order, self.matrices, strict=True)
        ]
        dtype = self.wide.dtype

        def step() -> list[Tensor]:
            return [fp8_gemm.linear(x, weight, bias, dtype) for x, weight, bias in calls]

        return step

    def error(self, step: Step, rows: int = 256) -> float:
        """The largest relative error of a step's products to fp32, on the first rows; NaN if any is."""
        got = cast(list[Tensor], step())
        found = []
        for out, x, (weight, bias) in zip(got, self._inputs(), self.matrices, strict=True):
            want = torch.nn.functional.linear(x[:, :rows].float(), weight.float(), bias.float())
            found.append((out[:, :rows].float() - want).norm() / want.norm())
        return float(torch.stack(found).max())  # of a NaN and others it is NaN


def attention_alone(inputs: Inputs, name: str) -> tuple[Step, bool]:
    """(8-bit self-attention of the share, whether its operands' quantisation is in it).

    cuDNN's can be had on operands that are in 8 bits already; the others are the engine's whole call.
    """
    q, k, v = inputs.received
    if name == "cudnn":
        from kernels.attention_8bit import cudnn_fp8

        given = cudnn_fp8.operands(q, k, v)
        return (lambda: cudnn_fp8.run(given)), False
    attend = backends(inputs.device)[name]
    return (lambda: attend(q, k, v)), True


def moved_bytes(inputs: Inputs, quantised: bool) -> int:
    """What an 8-bit block's passes read and write at the least, beside its products and attention.

    A feature: 11 for each of three joins of the fp32 residual (it and the branch in, it and e4m3 out), 12 for
    the q, k, v pass, 4 for the cross query's norm, 3 for the quantisation of each attention's output; 3 for
    each feature of the GELU's. Where attention's own quantisation isn't in it: 11 for each of the share's
    heads' features (q, k, v in and out, k's mean).
    """
    share = inputs.share
    here = share.tokens * (share.config.dim * (3 * 11 + 12 + 4 + 2 * 3) + 3 * share.config.ffn_dim)
    return here + (0 if quantised else 11 * share.total * share.heads * share.config.head_dim)


def floor(inputs: Inputs, name: str) -> Step:
    """What no 8-bit block on these libraries goes below, with 8-bit attention by `name`.

    Six products on operands in e4m3, that attention, cross-attention in bf16, and copies of as many bytes as
    the passes move.
    """
    products = Products(inputs).eight_bit()
    attention, quantised = attention_alone(inputs, name)
    config, device = inputs.share.config, inputs.device
    cross = choose("cross", torch.bfloat16, config.head_dim, device)
    query = torch.randn(1, inputs.share.tokens, config.num_heads, config.head_dim, device=device).bfloat16()
    half = moved_bytes(inputs, quantised) // 2
    source = torch.randint(256, (half,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def step() -> Tensor:
        products()
        attention()
        cross(query, *inputs.text)
        target.copy_(source)
        return target

    return step


assert set(LAYERS) < set(PRODUCTS)

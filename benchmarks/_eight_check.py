"""Errors to fp32 of what the presets' speed is measured on: a block, a stack of blocks, attention.

The block is of full width with random weights on a short sequence (`_variants.GRIDS`' "check"), alone on its
GPU; attention is of the real length, on a sample of queries. Errors are |got - want| / |want| of what the
block adds to its input.
"""

import copy
from functools import cached_property

import torch
from torch import Tensor

from benchmarks import _eight_variants as eight
from benchmarks._variants import Attend, Inputs, Share, ShareSequence, library, official, run_fused
from benchmarks._verify import relative_error, sampled_error
from engine import fused
from engine.eight_bit import EightBitBlocks


class Check:
    """One block on a short sequence, and what it gives in fp32."""

    def __init__(self, model: str, device: str) -> None:
        self.inputs = Inputs(Share(model, "check", 1), device=device)
        self._exact_block = copy.deepcopy(self.inputs.block).float()

    def exact(self, blocks: int) -> Tensor:
        """The stream after so many times the plain block, all in fp32."""
        inputs = self.inputs
        sequence = ShareSequence(inputs, library("sdpa"), library("sdpa"))
        text = (inputs.text[0].float(), inputs.text[1].float())
        x, total = inputs.x, inputs.share.total
        for _ in range(blocks):
            x = self._exact_block(x, inputs.e, 0, inputs.rope, text, sequence, total)
        return x

    @cached_property
    def once(self) -> Tensor:
        """After one block."""
        return self.exact(1)

    @cached_property
    def stack(self) -> Tensor:
        """After as many as the model has; all have the same weights, so that one block's fit anywhere."""
        return self.exact(self.inputs.share.config.num_layers)

    def official(self, attend: Attend) -> float:
        """Error of the official block."""
        out = official(self.inputs, attend)()
        assert isinstance(out, Tensor)
        return relative_error(out - self.inputs.x, self.once - self.inputs.x)

    def fused(self, sequence: ShareSequence, bits: EightBitBlocks | None, blocks: int = 1) -> float:
        """Error of the engine's block over `self.inputs`, in 8 bits by `bits`; of one, or of the stack."""
        inputs = self.inputs
        stream = fused.Stream(inputs.x)
        with eight.in_bits(inputs.block, bits):
            for _ in range(blocks):
                run_fused(inputs, stream, sequence)
        want = self.once if blocks == 1 else self.stack
        return relative_error(stream.joined(0) - inputs.x, want - inputs.x)

    def kept(self, sequence: ShareSequence, bits: EightBitBlocks) -> float:
        """Of an 8-bit block with a kept self-attention to the same block without: 0 if it is right."""
        outs = []
        for reuse in (False, True):
            torch.manual_seed(1)  # of the branch that is pending before the block
            outs.append(eight.eight_bit(self.inputs, sequence, bits, reuse_attention=reuse)())
        whole, got = outs
        assert isinstance(whole, Tensor)
        assert isinstance(got, Tensor)
        return relative_error(got, whole)


def attention_error(inputs: Inputs, attend: Attend) -> float:
    """Of self-attention at the share's real length, on a sample of its queries, to fp64."""
    q, k, v = inputs.received
    return sampled_error(attend(q, k, v), q, k, v)

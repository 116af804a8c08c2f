"""The text encoder with each layer's heads and features shared out over ranks: a contestant of the benchmark.

It divides the encoder's memory by the ranks, and pays with two sums over ranks a layer.
"""

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn


def shard_encoder(umt5: Any, group: dist.ProcessGroup | None = None) -> None:
    """Keep this rank's share of every layer, in place and for good. Ranks must divide the heads.

    Sums over ranks end each attention and each feed-forward, in the encoder's dtype.
    """
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)

    def keep(layer: Any, dim: int) -> None:
        layer.weight = nn.Parameter(layer.weight.data.chunk(ranks, dim)[rank].clone(), requires_grad=False)

    def add_up(layer: nn.Module, inputs: object, output: Tensor) -> Tensor:
        output = output.contiguous()
        dist.all_reduce(output, group=group)
        return output

    for block in umt5.encoder.block:
        attention, feed_forward = block.layer[0].SelfAttention, block.layer[1].DenseReluDense
        if attention.n_heads % ranks:
            raise ValueError(f"{attention.n_heads} heads of the text encoder don't divide by {ranks} ranks")
        attention.n_heads //= ranks
        attention.inner_dim //= ranks
        for layer in (attention.q, attention.k, attention.v, feed_forward.wi_0, feed_forward.wi_1):
            keep(layer, 0)
        for layer in (attention.o, feed_forward.wo):
            keep(layer, 1)
            layer.register_forward_hook(add_up)
        keep(attention.relative_attention_bias, 1)

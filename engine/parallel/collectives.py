"""Collectives under names that outlive torch's renames."""

import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed all_gather_into_tensor to all_gather_single.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def all_gather(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[ranks, *x.shape]: x of every rank of the group, in order; all shapes must be the same."""
    ranks = dist.get_world_size(group)
    gathered = x.new_empty((ranks * x.shape[0], *x.shape[1:]))
    _all_gather(gathered, x.contiguous(), group=group)
    return gathered.view(ranks, *x.shape)


def all_to_all(sent: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Row r of `sent` goes to rank r; row r of the result came from rank r."""
    sent = sent.contiguous()
    received = sent.new_empty(sent.shape)
    dist.all_to_all_single(received, sent, group=group)
    return received

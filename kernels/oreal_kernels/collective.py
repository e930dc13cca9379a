"""The exchanges of a tensor-parallel head; without a group, or in a group of one, nothing is sent."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def size(group: dist.ProcessGroup | None) -> int:
    return 1 if group is None else group.size()


def gather_parts(mine: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[4, N] of every rank -> [ranks, 4, N] in rank order: the one exchange of the forward."""
    if size(group) == 1:
        return mine[None]
    return gather_rows(mine[None], group)


def gather_rows(mine: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[N / ranks, H] -> [N, H]: a sequence-parallel input made whole."""
    whole = mine.new_empty(group.size() * len(mine), *mine.shape[1:])
    dist.all_gather_into_tensor(whole, mine.contiguous(), group=group)
    return whole


def scatter_sum(whole: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[N, H] of every rank -> this rank's [N / ranks, H] of the sum."""
    mine = whole.new_empty(len(whole) // group.size(), *whole.shape[1:])
    dist.reduce_scatter_tensor(mine, whole, group=group)
    return mine


def sum_over(tensor: Tensor, group: dist.ProcessGroup | None) -> dist.Work | None:
    """Start adding up a contiguous tensor over the ranks, in place; wait for the returned work."""
    return None if size(group) == 1 else dist.all_reduce(tensor, group=group, async_op=True)

"""Collectives of a tensor-parallel head; without a group, or in a group of one, nothing is sent."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def size(group: dist.ProcessGroup | None) -> int:
    """Return the number of ranks; 1 without a group."""
    return 1 if group is None else group.size()


def gather_statistics(local: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Gather [4, N] of every rank into [ranks, 4, N], in rank order: the only exchange of the forward."""
    if group is None or group.size() == 1:
        return local[None]
    return gather_rows(local[None], group)


def gather_rows(local: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Gather [N / ranks, H] of every rank into [N, H], e.g. a sequence-parallel input."""
    gathered = local.new_empty(group.size() * len(local), *local.shape[1:])
    dist.all_gather_into_tensor(gathered, local.contiguous(), group=group)
    return gathered


def reduce_scatter_rows(full: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum [N, H] over the ranks and return this rank's [N / ranks, H] of the sum."""
    local = full.new_empty(len(full) // group.size(), *full.shape[1:])
    dist.reduce_scatter_tensor(local, full, group=group)
    return local


def start_all_reduce(tensor: Tensor, group: dist.ProcessGroup | None) -> dist.Work | None:
    """Start to sum a contiguous tensor over the ranks, in place; the caller waits for the returned work."""
    return None if size(group) == 1 else dist.all_reduce(tensor, group=group, async_op=True)

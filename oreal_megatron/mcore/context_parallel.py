"""Context parallelism: distribution of the rows of a packed micro-batch over ranks.

A packed sequence of S rows is cut into 2 cp chunks; rank r has the r-th from the front and the r-th from the back, so
that all ranks have about equally many keys to attend to. No other package sees this: values of action tokens are
complete on every rank.
"""

from __future__ import annotations

import dataclasses
from functools import lru_cache

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch import Tensor

from oreal_megatron.records import MicroBatch


def world_size() -> int:
    """Return the number of context-parallel ranks."""
    return parallel_state.get_context_parallel_world_size()


def chunks(rows: int, rank: int, ranks: int) -> list[range]:
    """Return the rows of one rank; `rows` is a multiple of 2 x `ranks`."""
    if ranks == 1:
        return [range(rows)]
    size = rows // (2 * ranks)
    return [range(number * size, (number + 1) * size) for number in (rank, 2 * ranks - 1 - rank)]


def own_chunks(rows: int) -> list[range]:
    """Return the rows of this rank."""
    return chunks(rows, parallel_state.get_context_parallel_rank(), world_size())


def own_rows(rows: int, device: torch.device) -> Tensor:
    """Return the [S / cp] row numbers of this rank."""
    return _concatenate(own_chunks(rows)).to(device)


def gather_rows(own: Tensor) -> Tensor:
    """Return [S, ...] in order from every rank's [S / cp, ...]; gradients flow back to the ranks of the rows."""
    if world_size() == 1:
        return own
    group = parallel_state.get_context_parallel_group()
    by_rank = tensor_parallel.gather_from_sequence_parallel_region(own.contiguous(), group=group)
    return by_rank.index_select(0, _row_order(len(by_rank), world_size(), own.device))


def own_actions(micro_batch: MicroBatch, rows: Tensor) -> tuple[MicroBatch, Tensor | slice]:
    """Select the action tokens whose row, of `rows` [T], belongs to this rank.

    Returns them as a micro-batch with this rank's numbering of the rows, and their index within T.
    """
    if world_size() == 1:
        return dataclasses.replace(micro_batch, action_index=rows), slice(None)
    local_rows = own_rows(len(micro_batch.tokens), rows.device)
    local_number = torch.full_like(micro_batch.tokens, -1)
    local_number[local_rows] = torch.arange(len(local_rows), device=rows.device)
    index = (local_number[rows] >= 0).nonzero()[:, 0]
    selected = (local_number[rows] >= 0).long().cumsum(0)  # action tokens of this rank up to each one
    actions = dataclasses.replace(
        micro_batch,
        action_index=local_number[rows[index]],
        labels=micro_batch.labels[index],
        action_offsets=torch.cat([selected.new_zeros(1), selected])[micro_batch.action_offsets],
        engine_logprobs=micro_batch.engine_logprobs[index],
        carried=micro_batch.carried[index],
    )
    return actions, index


def combine_values(values: Tensor, index: Tensor | slice, tokens: int) -> Tensor:
    """Return [T] on every rank from each rank's values at its `index`.

    All ranks compute the same loss from the result, and each takes the gradient of its own values.
    """
    if isinstance(index, slice):
        return values
    scattered = values.new_zeros(tokens).index_copy(0, index, values)
    group = parallel_state.get_context_parallel_group()
    return tensor_parallel.reduce_from_tensor_model_parallel_region(scattered, group=group)


def sum_over_ranks(values: Tensor) -> Tensor:
    """Return the sum over ranks, without gradient."""
    if world_size() > 1:
        values = values.detach().clone()
        dist.all_reduce(values, group=parallel_state.get_context_parallel_group())
    return values.detach()


@lru_cache(maxsize=8)
def _row_order(rows: int, ranks: int, device: torch.device) -> Tensor:
    """Return the [S] position of each row when the ranks' rows are laid end to end."""
    return _concatenate([chunk for rank in range(ranks) for chunk in chunks(rows, rank, ranks)]).argsort().to(device)


def _concatenate(ranges: list[range]) -> Tensor:
    return torch.cat([torch.arange(rows.start, rows.stop) for rows in ranges])

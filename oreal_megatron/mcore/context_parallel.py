"""Context parallelism: the rows of a packed micro-batch that are this rank's, and what all ranks have, put together.

A packed sequence of S rows is cut into 2 cp chunks; rank r has the r-th from the front and from the back, so that all
have about as many keys to look at. Outside mcore nobody sees this: values of action tokens are whole on every rank.
"""

from __future__ import annotations

import dataclasses
from functools import lru_cache

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch import Tensor

from oreal_megatron.records import MicroBatch


def size() -> int:
    return parallel_state.get_context_parallel_world_size()


def chunks(rows: int, rank: int, ranks: int) -> list[range]:
    """The rows of one rank; `rows` is a multiple of 2 x `ranks`."""
    if ranks == 1:
        return [range(rows)]
    each = rows // (2 * ranks)
    return [range(number * each, (number + 1) * each) for number in (rank, 2 * ranks - 1 - rank)]


def own_chunks(rows: int) -> list[range]:
    return chunks(rows, parallel_state.get_context_parallel_rank(), size())


def own_rows(rows: int, device: torch.device) -> Tensor:
    """[S / cp] this rank's rows."""
    return _joined(own_chunks(rows)).to(device)


def gathered(mine: Tensor) -> Tensor:
    """[S, ...] in order from every rank's [S / cp, ...]; gradients go back to where the rows came from."""
    if size() == 1:
        return mine
    group = parallel_state.get_context_parallel_group()
    by_rank = tensor_parallel.gather_from_sequence_parallel_region(mine.contiguous(), group=group)
    return by_rank.index_select(0, _places(len(by_rank), size(), mine.device))


def part(micro_batch: MicroBatch, rows: Tensor) -> tuple[MicroBatch, Tensor | slice]:
    """The action tokens whose row, of `rows` [T], is this rank's: as a micro-batch with its own numbering of the rows,
    and which of the T they are."""
    if size() == 1:
        return dataclasses.replace(micro_batch, action_index=rows), slice(None)
    here = own_rows(len(micro_batch.tokens), rows.device)
    place = torch.full_like(micro_batch.tokens, -1)
    place[here] = torch.arange(len(here), device=rows.device)
    mine = (place[rows] >= 0).nonzero()[:, 0]
    left = (place[rows] >= 0).long().cumsum(0)  # of all action tokens up to each
    own = dataclasses.replace(
        micro_batch,
        action_index=place[rows[mine]],
        labels=micro_batch.labels[mine],
        action_offsets=torch.cat([left.new_zeros(1), left])[micro_batch.action_offsets],
        engine_logprobs=micro_batch.engine_logprobs[mine],
    )
    return own, mine


def whole(values: Tensor, mine: Tensor | slice, tokens: int) -> Tensor:
    """[T] on every rank from the values each has. All ranks go on to compute the same loss from it, and each takes the
    gradient of its own values."""
    if size() == 1:
        return values
    spread = values.new_zeros(tokens).index_copy(0, mine, values)
    group = parallel_state.get_context_parallel_group()
    return tensor_parallel.reduce_from_tensor_model_parallel_region(spread, group=group)


def total(values: Tensor) -> Tensor:
    """The sum over ranks, of numbers that nobody differentiates."""
    if size() > 1:
        values = values.detach().clone()
        dist.all_reduce(values, group=parallel_state.get_context_parallel_group())
    return values.detach()


@lru_cache(maxsize=8)
def _places(rows: int, ranks: int, device: torch.device) -> Tensor:
    """[S] where each row lies when the ranks' rows are laid end to end."""
    return _joined([chunk for rank in range(ranks) for chunk in chunks(rows, rank, ranks)]).argsort().to(device)


def _joined(ranges: list[range]) -> Tensor:
    return torch.cat([torch.arange(one.start, one.stop) for one in ranges])

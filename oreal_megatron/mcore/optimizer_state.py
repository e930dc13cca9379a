"""State of a distributed optimizer for a checkpoint, gathered on the first data-parallel rank.

Megatron's own gathering allocates six buffers of the host for each state and fills them one after the other; a GPU
waits for it. Here a state is gathered block by block where it is, and copied to the host once.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

STATES = ("param", "exp_avg", "exp_avg_sq")  # Megatron's names of the main weights and AdamW's moments
BLOCK = 2**26  # elements of all ranks that are gathered at once: 256 MiB on the device
Segments = list[tuple[int, Tensor]]  # first position, flat tensor


@torch.no_grad()
def sharded(optimizer: DistributedOptimizer, weights: dict[str, Any]) -> dict[int, dict[str, Any]] | None:
    """Return each parameter's state with its position in the full tensor; None on other ranks. Collective.

    `weights` is the sharded state of the model, whose positions the states share. The result has the format
    "fully_reshardable" of Megatron, which loads it.
    """
    positions = {entry.data: entry for entry in nested_values(extract_sharded_tensors_and_factories(weights)[0])}
    entries: dict[int, dict[str, Any]] = {}
    for ranges, buffer in zip(optimizer.gbuf_ranges, optimizer.buffers, strict=True):
        (buckets,) = ranges.values()  # by data type, of which each of Megatron's buffers has one
        host: dict[str, dict[Any, Tensor]] = {state: {} for state in STATES}
        for number, bucket in enumerate(buckets):
            for state in STATES:
                host[state].update(_gathered(optimizer, buffer, number, bucket["param_map"], state))
        if dist.get_rank(optimizer.data_parallel_group) == 0:
            for parameter in buffer.param_index_map:  # in this order Megatron loads them
                entries[len(entries)] = {
                    state: _placed(positions[parameter], state, host[state].pop(parameter)) for state in STATES
                }
    return entries or None


def _gathered(
    optimizer: DistributedOptimizer, buffer: Any, number: int, own: dict[Any, Any], state: str
) -> dict[Any, Tensor]:
    """Return one state of a bucket's parameters on the host of the first rank; empty elsewhere."""
    group = optimizer.data_parallel_group
    ranks, first = dist.get_world_size(group), dist.get_rank(group) == 0
    bucket = buffer.buckets[number]
    sources = [
        (where["gbuf_local"].start, optimizer._get_main_param_and_optimizer_states(parameter)[state].view(-1))
        for parameter, where in own.items()
    ]
    shapes = {
        parameter: (start - bucket.offset, parameter.shape)
        for parameter, (start, _, index) in buffer.param_index_map.items()
        if index == number
    }
    host = {parameter: torch.empty(shape) for parameter, (_, shape) in shapes.items()} if first else {}
    targets = [(shapes[parameter][0], tensor.view(-1)) for parameter, tensor in host.items()]
    shard = bucket.grad_data.numel() // ranks
    for start in range(0, shard, BLOCK // ranks):
        block = torch.zeros(min(BLOCK // ranks, shard - start), device=bucket.grad_data.device)
        for target, source in _overlaps(block, start, sources):
            target.copy_(source)
        blocks = [torch.empty_like(block) for _ in range(ranks)] if first else None
        dist.gather(block, blocks, group=group, group_dst=0)
        for rank, received in enumerate(blocks or ()):
            for source, target in _overlaps(received, rank * shard + start, targets):
                target.copy_(source)
    return host


def _overlaps(block: Tensor, start: int, segments: Segments) -> list[tuple[Tensor, Tensor]]:
    """Return the common parts of a block at a position and of segments, as pairs of views."""
    ends = [(max(first, start), min(first + len(flat), start + len(block)), first, flat) for first, flat in segments]
    return [
        (block[low - start : high - start], flat[low - first : high - first])
        for low, high, first, flat in ends
        if low < high
    ]


def _placed(position: Any, state: str, tensor: Tensor) -> Any:
    """Return a state at the position of its parameter; gate and up, which are stored apart, in storages of their own.

    Megatron clones views, and the fused tensor would stay beside them.
    """
    key = f"optimizer.state.{state}.{position.key}"
    if not isinstance(position, ShardedTensorFactory):
        return dataclasses.replace(position, key=key, data=tensor, dtype=tensor.dtype)
    parts = dataclasses.replace(position, key=key, data=tensor).build()
    return dict_list_map_inplace(lambda part: dataclasses.replace(part, data=part.data.clone()), parts)

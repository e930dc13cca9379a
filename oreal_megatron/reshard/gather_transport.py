"""Gather transport: full Hugging Face tensors on every rank. Generic, and correct for every layout.

Every rank derives the same sequence of tensors from the mapping, so no names or shapes are communicated. Tensors
travel in buckets: one all-gather over tensor-parallel ranks and one broadcast over pipeline stages for each bucket.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from oreal_megatron.models import tensors
from oreal_megatron.models.architecture import Architecture
from oreal_megatron.reshard.byte_counter import ByteCounter

BUCKET_BYTES = 256 * 2**20


@dataclass(frozen=True)
class GatherGroups:
    """Process groups over tensor-parallel ranks and over pipeline stages, and the tensors that travel in them."""

    tensor_group: dist.ProcessGroup
    pipeline_group: dist.ProcessGroup  # ranks in order of their stages
    dtype: torch.dtype
    device: torch.device
    chunks: int = 1  # interleaved chunks of layers on every pipeline stage
    head: str = "lm"  # or "scalar": output layer of the model


def gather_tensors(
    named_shards: Iterable[tuple[tensors.Entry, Tensor]],
    arch: Architecture,
    groups: GatherGroups,
    counter: ByteCounter,
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, full tensor) in Hugging Face terms, the same on every rank; every rank must exhaust the iterator.

    `named_shards` are this rank's parameters with their mapping entries. Buffers are fresh for every bucket, because
    vLLM's loaders may keep a tensor until the last one of its layer arrives. Bytes are added to `counter`. Collective.
    """
    shards = {entry.megatron: tensor.detach() for entry, tensor in named_shards}
    stages, ranks = groups.pipeline_group.size(), groups.tensor_group.size()
    for number in range(stages * groups.chunks):
        stage = number % stages
        entries = [
            entry
            for entry in tensors.entries(arch, ranks, stages * groups.chunks, number, groups.head)
            if entry.exported
        ]
        is_own_stage = stage == groups.pipeline_group.rank()
        for bucket in _buckets(entries, ranks, groups.dtype):
            yield from _bucket_tensors(bucket, shards if is_own_stage else None, stage, arch, groups, counter)


def _buckets(entries: list[tensors.Entry], ranks: int, dtype: torch.dtype) -> Iterator[list[tensors.Entry]]:
    """Split entries into consecutive buckets of at most BUCKET_BYTES of full tensors; a larger one travels alone."""
    bucket: list[tensors.Entry] = []
    size = 0
    for entry in entries:
        entry_bytes = entry.shard_shape(ranks).numel() * ranks * dtype.itemsize
        if bucket and size + entry_bytes > BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
        bucket.append(entry)
        size += entry_bytes
    yield bucket


def _bucket_tensors(
    bucket: list[tensors.Entry],
    shards: dict[str, Tensor] | None,
    stage: int,
    arch: Architecture,
    groups: GatherGroups,
    counter: ByteCounter,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the full tensors of one bucket. `shards` is None on the ranks of other stages."""
    ranks = groups.tensor_group.size()
    shapes = [entry.shard_shape(ranks) for entry in bucket]
    flat = torch.empty(ranks, sum(shape.numel() for shape in shapes), dtype=groups.dtype, device=groups.device)
    if shards is not None:
        packed = torch.cat([shards[entry.megatron].flatten() for entry in bucket])
        dist.all_gather(list(flat.unbind(0)), packed, group=groups.tensor_group)
        counter.all_gather(packed, groups.tensor_group)
    if groups.pipeline_group.size() > 1:
        source = dist.get_global_rank(groups.pipeline_group, stage)
        dist.broadcast(flat, source, group=groups.pipeline_group)
        counter.broadcast(flat, source, groups.pipeline_group)
    start = 0
    for entry, shape in zip(bucket, shapes, strict=True):
        rank_shards = [part[start : start + shape.numel()].view(shape) for part in flat]
        start += shape.numel()
        yield from tensors.to_hf(entry, arch, tensors.unshard(entry, rank_shards)).items()

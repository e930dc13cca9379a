"""Trainer's shards -> full Hugging Face tensors on every rank: the generic transport, correct for every layout.

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
    """Who holds what: process groups over tensor-parallel ranks and over pipeline stages, in rank order."""

    tensor_group: dist.ProcessGroup
    pipeline_group: dist.ProcessGroup
    dtype: torch.dtype
    device: torch.device
    chunks: int = 1  # interleaved chunks of layers on every pipeline stage


def full_tensors(
    placed: Iterable[tuple[tensors.Entry, Tensor]], arch: Architecture, layout: GatherGroups, counted: ByteCounter
) -> Iterator[tuple[str, Tensor]]:
    """(name, full tensor) in Hugging Face terms, the same on every rank. Collective: every rank must exhaust it.

    `placed` are this rank's tensors with their entries. Buffers are fresh for every bucket, because vLLM's loaders
    may keep a tensor until the last of its layer has come. What travels is added to `counted`.
    """
    mine = {entry.megatron: tensor.detach() for entry, tensor in placed}
    stages, ranks = layout.pipeline_group.size(), layout.tensor_group.size()
    for part in range(stages * layout.chunks):
        stage = part % stages
        cut = tensors.entries(arch, ranks, stages * layout.chunks, part, "lm")
        wanted = [entry for entry in cut if entry.exported]
        here = stage == layout.pipeline_group.rank()
        for bucket in _buckets(wanted, ranks, layout.dtype):
            yield from _bucket_tensors(bucket, mine if here else None, stage, arch, layout, counted)


def _buckets(entries: list[tensors.Entry], ranks: int, dtype: torch.dtype) -> Iterator[list[tensors.Entry]]:
    """Consecutive entries whose full tensors fit BUCKET_BYTES together; a larger one travels alone."""
    bucket: list[tensors.Entry] = []
    size = 0
    for entry in entries:
        bytes_needed = entry.shard_shape(ranks).numel() * ranks * dtype.itemsize
        if bucket and size + bytes_needed > BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
        bucket.append(entry)
        size += bytes_needed
    yield bucket


def _bucket_tensors(
    bucket: list[tensors.Entry],
    mine: dict[str, Tensor] | None,
    stage: int,
    arch: Architecture,
    layout: GatherGroups,
    counted: ByteCounter,
) -> Iterator[tuple[str, Tensor]]:
    ranks = layout.tensor_group.size()
    shapes = [entry.shard_shape(ranks) for entry in bucket]
    flat = torch.empty(ranks, sum(shape.numel() for shape in shapes), dtype=layout.dtype, device=layout.device)
    if mine is not None:
        packed = torch.cat([mine[entry.megatron].flatten() for entry in bucket])
        dist.all_gather(list(flat.unbind(0)), packed, group=layout.tensor_group)
        counted.all_gather(packed, layout.tensor_group)
    if layout.pipeline_group.size() > 1:
        source = dist.get_global_rank(layout.pipeline_group, stage)
        dist.broadcast(flat, source, group=layout.pipeline_group)
        counted.broadcast(flat, source, layout.pipeline_group)
    offset = 0
    for entry, shape in zip(bucket, shapes, strict=True):
        shards = [part[offset : offset + shape.numel()].view(shape) for part in flat]
        offset += shape.numel()
        yield from tensors.to_hf(entry, arch, tensors.unshard(entry, shards)).items()

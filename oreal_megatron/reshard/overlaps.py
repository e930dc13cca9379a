"""Overlaps between the shards of the trainer and those of the engine: the parts of tensors that must travel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import NamedTuple

from oreal_megatron.models.architecture import Architecture
from oreal_megatron.reshard import shards, vllm_layout
from oreal_megatron.reshard.shards import Offset, Region, Shard

StageAndTensorRank = tuple[int, int]  # pipeline stage, tensor-parallel rank of the trainer


@dataclass(frozen=True)
class ReshardLayout:
    """Parallel layout of trainer and engine on the same ranks. Megatron's order of ranks is tensor, data, pipeline."""

    arch: Architecture
    tensor: int
    pipeline: int
    chunks: int  # interleaved chunks of layers on each pipeline stage
    engine: int  # ranks of one engine replica, consecutive
    world: int
    node: int  # ranks on one node

    @property
    def data(self) -> int:
        """Number of data-parallel replicas of the trainer, context-parallel ranks included."""
        return self.world // (self.tensor * self.pipeline)

    def stage_and_tensor_rank(self, rank: int) -> StageAndTensorRank:
        """Return pipeline stage and tensor-parallel rank of a rank of the trainer."""
        return rank // (self.tensor * self.data), rank % self.tensor

    def replica_ranks(self, stage: int, tensor_rank: int) -> range:
        """Return the data-parallel ranks that hold the same shards."""
        first = stage * self.tensor * self.data
        return range(first + tensor_rank, first + self.tensor * self.data, self.tensor)


class Overlap(NamedTuple):
    """A region of a Hugging Face tensor that travels in one part."""

    rows: int
    columns: int
    holders: dict[StageAndTensorRank, Offset]  # trainer
    targets: dict[int, Offset]  # by rank within an engine replica


def overlaps(layout: ReshardLayout) -> Iterator[Overlap]:
    """Yield all overlaps, pipeline stages in turn so that all of them send from the beginning."""
    trainer_shards: dict[str, list[tuple[StageAndTensorRank, Shard]]] = {}
    for stage in range(layout.pipeline):
        for tensor_rank in range(layout.tensor):
            for shard in shards.trainer_shards(
                layout.arch, layout.tensor, tensor_rank, layout.pipeline, stage, layout.chunks
            ):
                trainer_shards.setdefault(shard.name, []).append(((stage, tensor_rank), shard))
    engine_shards: dict[str, list[tuple[int, Shard]]] = {}
    for engine_rank in range(layout.engine):
        for shard in vllm_layout.engine_shards(layout.arch, layout.engine, engine_rank):
            engine_shards.setdefault(shard.name, []).append((engine_rank, shard))
    by_stage: list[list[Overlap]] = [[] for _ in range(layout.pipeline)]
    for name, targets in engine_shards.items():
        first_stage = trainer_shards[name][0][0][0]
        by_stage[first_stage] += _tensor_overlaps(trainer_shards[name], targets)
    for row in zip_longest(*by_stage):
        yield from (part for part in row if part is not None)


def _tensor_overlaps(
    trainer_shards: list[tuple[StageAndTensorRank, Shard]], engine_shards: list[tuple[int, Shard]]
) -> list[Overlap]:
    """Return the overlaps of one Hugging Face tensor."""
    by_region: dict[Region, Overlap] = {}
    for holder, source in trainer_shards:
        for engine_rank, target in engine_shards:
            if shared := shards.overlap(source, target):
                region, source_offset, target_offset = shared
                part = by_region.setdefault(region, Overlap(region.rows, region.columns, {}, {}))
                part.holders[holder] = source_offset
                part.targets[engine_rank] = target_offset
    return list(by_region.values())

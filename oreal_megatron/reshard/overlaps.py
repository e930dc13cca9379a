"""The slices that travel: where what a trainer's rank holds and what an engine's rank needs overlap."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import NamedTuple

from oreal_megatron.models.architecture import Architecture
from oreal_megatron.reshard import shards, vllm_layout
from oreal_megatron.reshard.shards import Offset, Region, Shard


@dataclass(frozen=True)
class ReshardLayout:
    """Trainer and engine on the same ranks; Megatron's order of ranks is tensor, data, pipeline."""

    arch: Architecture
    tensor: int
    pipeline: int
    chunks: int  # interleaved chunks of layers on each pipeline stage
    engine: int  # ranks of one replica of the engine, consecutive
    world: int
    node: int  # ranks on one node

    @property
    def data(self) -> int:
        return self.world // (self.tensor * self.pipeline)

    def place(self, rank: int) -> tuple[int, int]:
        """(pipeline stage, tensor-parallel rank) of a rank of the trainer."""
        return rank // (self.tensor * self.data), rank % self.tensor

    def ranks(self, stage: int, tensor: int) -> range:
        """The data-parallel ranks that hold the same shard."""
        first = stage * self.tensor * self.data
        return range(first + tensor, first + self.tensor * self.data, self.tensor)


class Overlap(NamedTuple):
    """A rectangle of a Hugging Face tensor that travels as one."""

    rows: int
    columns: int
    holders: dict[tuple[int, int], Offset]  # by (pipeline stage, tensor-parallel rank) of the trainer
    targets: dict[int, Offset]  # by rank within a replica of the engine


def overlaps(layout: ReshardLayout) -> Iterator[Overlap]:
    """All slices, those of different pipeline stages in turn so that all of them send from the beginning."""
    held: dict[str, list[tuple[tuple[int, int], Shard]]] = {}
    for stage in range(layout.pipeline):
        for tensor in range(layout.tensor):
            for piece in shards.trainer(layout.arch, layout.tensor, tensor, layout.pipeline, stage, layout.chunks):
                held.setdefault(piece.name, []).append(((stage, tensor), piece))
    wanted: dict[str, list[tuple[int, Shard]]] = {}
    for engine in range(layout.engine):
        for piece in vllm_layout.pieces(layout.arch, layout.engine, engine):
            wanted.setdefault(piece.name, []).append((engine, piece))
    stages: list[list[Overlap]] = [[] for _ in range(layout.pipeline)]
    for name, targets in wanted.items():
        stages[held[name][0][0][0]] += _cross(held[name], targets)
    for row in zip_longest(*stages):
        yield from (part for part in row if part is not None)


def _cross(held: list[tuple[tuple[int, int], Shard]], wanted: list[tuple[int, Shard]]) -> list[Overlap]:
    """The slices of one Hugging Face tensor."""
    found: dict[Region, Overlap] = {}
    for place, source in held:
        for engine, target in wanted:
            if shared := shards.overlap(source, target):
                rectangle, origin, end = shared
                part = found.setdefault(rectangle, Overlap(rectangle.rows, rectangle.columns, {}, {}))
                part.holders[place] = origin
                part.targets[engine] = end
    return list(found.values())

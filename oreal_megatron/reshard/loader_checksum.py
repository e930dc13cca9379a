"""Checksum of the tensors given to the engine's loader, for engines whose parameters cannot be read.

Each rank sums every full tensor when the loader takes it; the trainer's ranks sum their shards of it (checksum.py).
The loader's own work is covered by the logprob parity check only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from oreal_megatron.models import tensors
from oreal_megatron.reshard import shards
from oreal_megatron.reshard.checksum import ChecksumMismatch, PositionFactors, compare
from oreal_megatron.reshard.overlaps import ReshardLayout
from oreal_megatron.reshard.shards import Offset, Region, Shard, as_matrix


class LoaderChecksum:
    """Checksums of full Hugging Face tensors; `dtype` and `device` are the trainer's."""

    def __init__(self, layout: ReshardLayout, rank: int, dtype: torch.dtype, device: torch.device):
        entries = [entry for entry in tensors.entries(layout.arch, 1, 1, 0, "lm") if entry.exported]
        shapes = {name: shape for entry in entries for name, shape in tensors.hf_shapes(entry, layout.arch).items()}
        self.index = {name: number for number, name in enumerate(shapes)}
        self.weights = PositionFactors(max(max(shape) for shape in shapes.values()), dtype, device)
        self.shards = list(responsible_shards(layout, rank))
        self.loaded: Tensor | None = None
        self.previous: Tensor | None = None

    @torch.no_grad()
    def watch(self, full_tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yield the same tensors, each one summed first."""
        self.loaded = torch.zeros(len(self.index), dtype=torch.int64, device=self.weights.device)
        for name, tensor in full_tensors:
            term = self.weights.term(tensor, Offset(name, 0, 0), 0, 0, *as_matrix(tensor).shape)
            self.loaded += self.weights.sums([self.index[name]], [term], len(self.index))
            yield name, tensor

    @torch.no_grad()
    def mismatches(self, trainer_tensors: dict[str, Tensor]) -> list[ChecksumMismatch]:
        """Return the tensors given to this rank's loader that differ from the trainer's weights. Collective."""
        if self.loaded is None:
            raise RuntimeError("no tensors were watched before the comparison")
        terms = [
            self.weights.term(trainer_tensors[offset.tensor], offset, *region) for _, region, offset in self.shards
        ]
        expected = self.weights.sums([self.index[shard.name] for shard in self.shards], terms, len(self.index))
        dist.all_reduce(expected)
        result = compare(list(self.index), expected, self.loaded, self.previous)
        self.previous = self.loaded
        return result


def responsible_shards(layout: ReshardLayout, rank: int) -> Iterator[Shard]:
    """Yield the trainer's shards that a rank sums; every element of the model belongs to exactly one rank."""
    seen: set[tuple[str, Region]] = set()
    for stage in range(layout.pipeline):
        for tensor_rank in range(layout.tensor):
            for shard in shards.trainer_shards(
                layout.arch, layout.tensor, tensor_rank, layout.pipeline, stage, layout.chunks
            ):
                if shard[:2] not in seen:  # replicas hold the same regions
                    seen.add(shard[:2])
                    if rank == layout.replica_ranks(stage, tensor_rank)[0]:
                        yield shard

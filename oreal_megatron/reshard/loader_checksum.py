"""The proof for an engine whose parameters cannot be read: what its loader is given are the trainer's weights.

Each rank sums every full tensor when the loader takes it; the trainer's ranks sum what they hold of it (checksum.py).
What the loader makes of the tensors is left to the comparison of log-probs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from oreal_megatron.models import tensors
from oreal_megatron.reshard import shards
from oreal_megatron.reshard.checksum import Difference, WeightChecksums, differences
from oreal_megatron.reshard.overlaps import ReshardLayout
from oreal_megatron.reshard.shards import Offset, Shard, matrix


class LoaderChecksum:
    """Checksums of full Hugging Face tensors; `dtype` and `device` are the trainer's."""

    def __init__(self, layout: ReshardLayout, rank: int, dtype: torch.dtype, device: torch.device):
        entries = [entry for entry in tensors.entries(layout.arch, 1, 1, 0, "lm") if entry.exported]
        shapes = {name: shape for entry in entries for name, shape in tensors.hf_shapes(entry, layout.arch).items()}
        self.place = {name: number for number, name in enumerate(shapes)}
        self.weights = WeightChecksums(max(max(shape) for shape in shapes.values()), dtype, device)
        self.answered = list(answered(layout, rank))
        self.before: Tensor | None = None

    @torch.no_grad()
    def passing(self, full: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The same tensors, each summed before it is passed on."""
        self.own = torch.zeros(len(self.place), dtype=torch.int64, device=self.weights.device)
        for name, tensor in full:
            whole = self.weights.term(tensor, Offset(name, 0, 0), 0, 0, *matrix(tensor).shape)
            self.own += self.weights.sums([self.place[name]], [whole], len(self.place))
            yield name, tensor

    @torch.no_grad()
    def differing(self, held: dict[str, Tensor]) -> list[Difference]:
        """The tensors passed on to this rank's loader that are not what the trainer holds. Collective."""
        terms = [self.weights.term(held[spot.tensor], spot, *rectangle) for _, rectangle, spot in self.answered]
        expected = self.weights.sums([self.place[piece.name] for piece in self.answered], terms, len(self.place))
        dist.all_reduce(expected)
        found = differences(list(self.place), expected, self.own, self.before)
        self.before = self.own
        return found


def answered(layout: ReshardLayout, rank: int) -> Iterator[Shard]:
    """The pieces of the trainer that a rank answers for: every element of the model has one rank that does."""
    seen = set()
    for stage in range(layout.pipeline):
        for tensor in range(layout.tensor):
            for piece in shards.trainer(layout.arch, layout.tensor, tensor, layout.pipeline, stage, layout.chunks):
                if piece[:2] not in seen:  # replicas hold the same rectangles
                    seen.add(piece[:2])
                    if rank == layout.ranks(stage, tensor)[0]:
                        yield piece

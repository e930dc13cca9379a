"""What each rank holds of the Hugging Face tensors, on the trainer's side and on the engine's.

Both sides are described as pieces: a rectangle of a Hugging Face tensor, and where it lies in a tensor of the rank. A
tensor of one dimension counts as one column. Rows are those of the stored matrices, not heads, because a shard of
Megatron's `linear_qkv` may end inside a group of heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from oreal_megatron.models import tensors
from oreal_megatron.models.architecture import Architecture


class Region(NamedTuple):
    """Rows and columns of a Hugging Face tensor."""

    row: int
    column: int
    rows: int
    columns: int


class Offset(NamedTuple):
    """Where a rectangle begins in a tensor of a rank."""

    tensor: str
    row: int
    column: int


class Shard(NamedTuple):
    name: str  # of the Hugging Face tensor
    rectangle: Region
    spot: Offset


def overlap(one: Shard, other: Shard) -> tuple[Region, Offset, Offset] | None:
    """The rectangle that two pieces of the same Hugging Face tensor share, and where it begins in each."""
    (row, column, rows, columns), (row2, column2, rows2, columns2) = one.rectangle, other.rectangle
    top, left = max(row, row2), max(column, column2)
    height, width = min(row + rows, row2 + rows2) - top, min(column + columns, column2 + columns2) - left
    if height <= 0 or width <= 0:
        return None
    first, second = one.spot, other.spot
    return (
        Region(top, left, height, width),
        Offset(first.tensor, first.row + top - row, first.column + left - column),
        Offset(second.tensor, second.row + top - row2, second.column + left - column2),
    )


def matrix(tensor: Tensor) -> Tensor:
    """[R, C] view of a parameter; a vector is one column."""
    return tensor.detach().view(tensor.shape[0], -1)


def cut(matrix: Tensor, spot: Offset, rows: int, columns: int) -> Tensor:
    """[rows, columns] view of a matrix, beginning at a spot."""
    return matrix[spot.row : spot.row + rows, spot.column : spot.column + columns]


def trainer(arch: Architecture, ranks: int, rank: int, stages: int, stage: int, chunks: int) -> Iterator[Shard]:
    """Pieces of one tensor-parallel rank on one pipeline stage of Megatron (models/tensors.py).

    The tied copy of the embedding on the last stage is a piece as well: it is a replica like any other.
    """
    for chunk in range(chunks):
        for entry in tensors.entries(arch, ranks, stages * chunks, chunk * stages + stage, "lm"):
            row = 0  # in the shard
            for region in entry.regions(rank, ranks):
                yield from _region(entry, arch, region, row)
                row += region.size[0]


def _region(entry: tensors.Entry, arch: Architecture, region: tensors.Region, at: int) -> Iterator[Shard]:
    """Pieces of a rectangle of a full Megatron tensor that begins at row `at` of the shard."""
    column, columns = (region.start[1], region.size[1]) if len(region.size) > 1 else (0, 1)
    top, bottom = region.start[0], region.start[0] + region.size[0]
    for name, row, first, count in _blocks(entry, arch):
        start, stop = max(top, row), min(bottom, row + count)
        if start < stop:
            rectangle = Region(first + start - row, column, stop - start, columns)
            yield Shard(name, rectangle, Offset(entry.megatron, at + start - top, 0))


def _blocks(entry: tensors.Entry, arch: Architecture) -> Iterator[tuple[str, int, int, int]]:
    """(Hugging Face name, first row in Megatron's tensor, first row in Hugging Face's, rows) of consecutive rows."""
    if len(entry.hf) == 3:  # for each group its queries, its key, its value
        query, key, value = entry.hf
        size = arch.head_dim
        queries = arch.heads // arch.kv_groups * size
        for group in range(arch.kv_groups):
            row = group * (queries + 2 * size)
            yield query, row, group * queries, queries
            yield key, row + queries, group * size, size
            yield value, row + queries + size, group * size, size
    elif entry.cut is tensors.Cut.VOCABULARY:  # what lies beyond is padding
        yield entry.hf[0], 0, 0, arch.vocab
    else:
        rows = entry.shape[0] // len(entry.hf)
        for number, name in enumerate(entry.hf):
            yield name, number * rows, 0, rows

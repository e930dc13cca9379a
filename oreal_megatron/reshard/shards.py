"""Shards of the trainer: the parts of Hugging Face tensors that a rank of Megatron holds.

Trainer and engine are both described by shards: a rectangular region of a Hugging Face tensor, and its offset in a
tensor of the rank. A tensor of one dimension counts as one column. Rows are those of the stored matrices, not heads,
because a shard of Megatron's `linear_qkv` may end inside a group of heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from oreal_megatron.models import tensors
from oreal_megatron.models.architecture import Architecture


class Region(NamedTuple):
    """A rectangle of a Hugging Face tensor."""

    row: int
    column: int
    rows: int
    columns: int


class Offset(NamedTuple):
    """The first row and column of a region within a tensor of a rank."""

    tensor: str
    row: int
    column: int


class Shard(NamedTuple):
    """A region of a Hugging Face tensor, and its offset in a tensor of the rank that holds it."""

    name: str  # of the Hugging Face tensor
    region: Region
    offset: Offset


def overlap(a: Shard, b: Shard) -> tuple[Region, Offset, Offset] | None:
    """Return the region that two shards of one Hugging Face tensor share and its offset in each; None without one."""
    (row_a, column_a, rows_a, columns_a), (row_b, column_b, rows_b, columns_b) = a.region, b.region
    top, left = max(row_a, row_b), max(column_a, column_b)
    height, width = min(row_a + rows_a, row_b + rows_b) - top, min(column_a + columns_a, column_b + columns_b) - left
    if height <= 0 or width <= 0:
        return None
    return (
        Region(top, left, height, width),
        Offset(a.offset.tensor, a.offset.row + top - row_a, a.offset.column + left - column_a),
        Offset(b.offset.tensor, b.offset.row + top - row_b, b.offset.column + left - column_b),
    )


def as_matrix(tensor: Tensor) -> Tensor:
    """Return a [rows, columns] view of a parameter; a vector becomes one column."""
    return tensor.detach().view(tensor.shape[0], -1)


def submatrix(matrix: Tensor, offset: Offset, rows: int, columns: int) -> Tensor:
    """Return the [rows, columns] view of a matrix that begins at an offset."""
    return matrix[offset.row : offset.row + rows, offset.column : offset.column + columns]


def trainer_shards(
    arch: Architecture, tensor_ranks: int, tensor_rank: int, stages: int, stage: int, chunks: int
) -> Iterator[Shard]:
    """Yield the shards of one tensor-parallel rank on one pipeline stage of Megatron (models/tensors.py).

    The tied copy of the embedding on the last stage is a shard too: a replica like any other.
    """
    for chunk in range(chunks):
        for entry in tensors.entries(arch, tensor_ranks, stages * chunks, chunk * stages + stage, "lm"):
            row = 0  # in the shard
            for region in entry.regions(tensor_rank, tensor_ranks):
                yield from _region_shards(entry, arch, region, row)
                row += region.size[0]


def _region_shards(
    entry: tensors.Entry, arch: Architecture, region: tensors.TensorBlock, first_row: int
) -> Iterator[Shard]:
    """Yield the shards within a region of a full Megatron tensor that begins at `first_row` of the rank's tensor."""
    column, columns = (region.start[1], region.size[1]) if len(region.size) > 1 else (0, 1)
    top, bottom = region.start[0], region.start[0] + region.size[0]
    for name, megatron_row, hf_row, rows in _row_blocks(entry, arch):
        start, stop = max(top, megatron_row), min(bottom, megatron_row + rows)
        if start < stop:
            hf_region = Region(hf_row + start - megatron_row, column, stop - start, columns)
            yield Shard(name, hf_region, Offset(entry.megatron, first_row + start - top, 0))


def _row_blocks(entry: tensors.Entry, arch: Architecture) -> Iterator[tuple[str, int, int, int]]:
    """Yield (Hugging Face name, first row in Megatron's tensor, first row in Hugging Face's, rows) of row blocks."""
    if len(entry.hf) == 3:  # each group's queries, its key, its value
        query, key, value = entry.hf
        head = arch.head_dim
        query_rows = arch.heads // arch.kv_groups * head
        for group in range(arch.kv_groups):
            row = group * (query_rows + 2 * head)
            yield query, row, group * query_rows, query_rows
            yield key, row + query_rows, group * head, head
            yield value, row + query_rows + head, group * head, head
    elif entry.sharding is tensors.Sharding.VOCABULARY:  # the rows beyond are padding
        yield entry.hf[0], 0, 0, arch.vocab
    else:
        rows = entry.shape[0] // len(entry.hf)
        for number, name in enumerate(entry.hf):
            yield name, number * rows, 0, rows

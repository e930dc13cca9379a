"""Checksums of weights, computed by trainer and engine, to verify that the engine holds the trainer's weights.

The checksum of a matrix is the sum over its 16-bit words of  word * a(row) * b(column)  modulo 2^64, with odd weights
a and b derived from the position within the matrix. It is exact in any order and additive over regions, so each rank
of the trainer sums its shards and only the sums are reduced. A change of one element always changes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from oreal_megatron.reshard import vllm_layout
from oreal_megatron.reshard.overlaps import ReshardLayout
from oreal_megatron.reshard.planner import TransferPlan
from oreal_megatron.reshard.shards import Offset, as_matrix, submatrix

CHUNK_WORDS = 2**24  # of a region at a time: 64 MiB of products


class ChecksumMismatch(NamedTuple):
    """A tensor whose checksum differs from the trainer's."""

    name: str
    unchanged: bool  # since the previous weight sync, where there was one: not written, or the same data again


class ChecksumTerm(NamedTuple):
    """A region to be summed: its elements, and the weights of its position in the matrix."""

    elements: Tensor  # [r, c], or [r, c * words of an element] int16
    column_factors: Tensor  # [c * words] int32
    row_factors: Tensor  # [r] int64


class PositionFactors:
    """Weights of the positions in matrices of elements of `dtype` with at most `longest` rows and columns."""

    def __init__(self, longest: int, dtype: torch.dtype, device: torch.device):
        self.dtype, self.device, self.words = dtype, device, dtype.itemsize // 2
        position = torch.arange(longest * self.words, device=device)
        self.rows = _hashed(position, 0x5BF03635) | 1
        self.columns = (_hashed(position, 0x2545F491) >> 20 & 0x7FFF | 1).int()  # below 2^15: products fit 32 bits

    def term(self, tensor: Tensor, source: Offset, row: int, column: int, rows: int, columns: int) -> ChecksumTerm:
        """Return the region of `tensor` that begins at `source` and lies at (row, column) of the matrix."""
        elements = submatrix(as_matrix(tensor), source, rows, columns)
        if elements.dtype == self.dtype:
            elements = elements.view(torch.int16)
        column_factors = self.columns[column * self.words : (column + columns) * self.words]
        return ChecksumTerm(elements, column_factors, self.rows[row : row + rows])

    def sums(self, index: Sequence[int] | Tensor, terms: Sequence[ChecksumTerm], size: int) -> Tensor:
        """Return [size] int64 sums; each term is added at its `index`."""
        total = torch.zeros(size, dtype=torch.int64, device=self.device)
        if terms:
            index = torch.as_tensor(index, device=self.device)
            total.index_add_(0, index, torch.stack([self._sum(*term) for term in terms]))
        return total

    def _sum(self, elements: Tensor, column_factors: Tensor, row_factors: Tensor) -> Tensor:
        if elements.dtype != torch.int16:  # the trainer's dtype differs: what travels is cast
            elements = elements.to(self.dtype).view(torch.int16)
        step = max(CHUNK_WORDS // len(column_factors), 1)
        if step >= len(row_factors):
            return ((elements * column_factors).sum(1, dtype=torch.int64) * row_factors).sum()
        chunks = zip(elements.split(step), row_factors.split(step), strict=True)
        partial = [((words * column_factors).sum(1, dtype=torch.int64) * rows).sum() for words, rows in chunks]
        return torch.stack(partial).sum()


class EngineChecksum:
    """Checksums of this rank's engine parameters, and of its shards of the trainer.

    Holds views of the tensors, as direct_transport.DirectTransfer does. `previous`: [parameters] int64 sums of the
    engine after the previous weight sync, if there was one.
    """

    def __init__(
        self,
        layout: ReshardLayout,
        plan: TransferPlan,
        rank: int,
        trainer_tensors: dict[str, Tensor],
        parameters: dict[str, Tensor],
        previous: Tensor | None = None,
    ):
        self.ranks, self.rank, self.names = layout.engine, rank % layout.engine, list(parameters)
        first = next(iter(parameters.values()))
        longest = max(max(as_matrix(tensor).shape) for tensor in parameters.values())
        self.weights = PositionFactors(longest, first.dtype, first.device)
        self.previous = previous
        number = {name: index for index, name in enumerate(self.names)}

        def term(tensor: Tensor, source: Offset, target: Offset, rows: int, columns: int) -> ChecksumTerm:
            return self.weights.term(tensor, source, target.row, target.column, rows, columns)

        self.engine_terms = self._indexed(
            [
                (number[offset.tensor], term(parameters[offset.tensor], offset, offset, rows, columns))
                for _, (_, _, rows, columns), offset in vllm_layout.engine_shards(layout.arch, layout.engine, self.rank)
                if rows
            ]
        )
        self.trainer_terms = self._indexed(
            [
                (
                    part.engine_rank * len(number) + number[part.target.tensor],
                    term(trainer_tensors[part.source.tensor], part.source, part.target, part.rows, part.columns),
                )
                for part in plan.checksum_parts
            ]
        )

    @torch.no_grad()
    def mismatches(self) -> list[ChecksumMismatch]:
        """Return this rank's engine parameters that differ from the trainer's weights. Collective."""
        expected, actual = self.trainer_sums(), self.engine_sums()
        dist.all_reduce(expected)
        result = compare(self.names, expected[self.rank], actual, self.previous)
        self.previous = actual
        return result

    @torch.no_grad()
    def engine_sums(self) -> Tensor:
        """Return [parameters] int64 of this rank's engine, without padding."""
        return self.weights.sums(*self.engine_terms, len(self.names))

    @torch.no_grad()
    def trainer_sums(self) -> Tensor:
        """Return [E, parameters] int64: this rank's contribution to the expected sums of a replica's E ranks."""
        return self.weights.sums(*self.trainer_terms, self.ranks * len(self.names)).view(self.ranks, -1)

    def _indexed(self, terms: list[tuple[int, ChecksumTerm]]) -> tuple[Tensor, list[ChecksumTerm]]:
        return torch.tensor([index for index, _ in terms], device=self.weights.device), [term for _, term in terms]


def compare(names: Sequence[str], expected: Tensor, actual: Tensor, previous: Tensor | None) -> list[ChecksumMismatch]:
    """Return the tensors whose sums differ, and whether each one equals its sum of the `previous` weight sync."""
    unchanged = actual == previous if previous is not None else torch.zeros_like(actual, dtype=torch.bool)
    indices = (expected != actual).nonzero().flatten().tolist()
    return [ChecksumMismatch(names[index], bool(unchanged[index])) for index in indices]


def _hashed(position: Tensor, salt: int) -> Tensor:
    """Return int64 pseudo-random numbers, a function of the position."""
    mixed = (position + salt) * 0x1E3779B97F4A7C15
    mixed = (mixed ^ (mixed >> 29)) * 0x3F58476D1CE4E5B9
    return mixed ^ (mixed >> 32)

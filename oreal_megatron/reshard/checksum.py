"""Checksums that prove an engine to hold the trainer's weights, computed on both sides.

The checksum of a matrix is the sum over its 16-bit words of  word * a(row) * b(column)  modulo 2^64, with odd weights
a and b drawn from the position within the matrix. It is exact in any order and adds up over slices, so the trainer's
ranks each sum what they hold and only the sums are reduced. One changed element always changes it.
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
from oreal_megatron.reshard.shards import Offset, cut, matrix

CHUNK_WORDS = 2**24  # of a slice at a time: 64 MiB of products


class Difference(NamedTuple):
    """A tensor that is not the trainer's."""

    name: str
    unchanged: bool  # since the proof before, as far as this one knows: nothing was written, or the same again


class Term(NamedTuple):
    """A slice that is summed: its elements, and the weights of where it lies in the matrix."""

    part: Tensor  # [r, c], or [r, c * words of an element] int16
    across: Tensor  # [c * words] int32
    down: Tensor  # [r] int64


class WeightChecksums:
    """Weights of the positions in matrices of elements of `dtype`, none of more rows or columns than `longest`."""

    def __init__(self, longest: int, dtype: torch.dtype, device: torch.device):
        self.dtype, self.device, self.words = dtype, device, dtype.itemsize // 2
        position = torch.arange(longest * self.words, device=device)
        self.down = _mixed(position, 0x5BF03635) | 1
        self.across = (_mixed(position, 0x2545F491) >> 20 & 0x7FFF | 1).int()  # below 2^15: products fit 32 bits

    def term(self, tensor: Tensor, source: Offset, row: int, column: int, rows: int, columns: int) -> Term:
        """The slice of `tensor` that begins at `source` and lies at (row, column) of the matrix."""
        part = cut(matrix(tensor), source, rows, columns)
        if part.dtype == self.dtype:
            part = part.view(torch.int16)
        across = self.across[column * self.words : (column + columns) * self.words]
        return Term(part, across, self.down[row : row + rows])

    def sums(self, where: Sequence[int] | Tensor, terms: Sequence[Term], size: int) -> Tensor:
        """[size] int64; each term is added at its place in `where`."""
        total = torch.zeros(size, dtype=torch.int64, device=self.device)
        if terms:
            where = torch.as_tensor(where, device=self.device)
            total.index_add_(0, where, torch.stack([self._sum(*term) for term in terms]))
        return total

    def _sum(self, part: Tensor, across: Tensor, down: Tensor) -> Tensor:
        if part.dtype != torch.int16:  # the trainer's type is another: what travels is cast
            part = part.to(self.dtype).view(torch.int16)
        step = max(CHUNK_WORDS // len(across), 1)
        if step >= len(down):
            return ((part * across).sum(1, dtype=torch.int64) * down).sum()
        chunks = zip(part.split(step), down.split(step), strict=True)
        return torch.stack([((words * across).sum(1, dtype=torch.int64) * rows).sum() for words, rows in chunks]).sum()


class Checksums:
    """Checksums of this rank's engine parameters (`live`), and of what it holds of the trainer's (`held`).

    Holds views of the tensors, as reshard/direct_transport.py does.
    """

    def __init__(
        self, layout: ReshardLayout, plan: TransferPlan, rank: int, held: dict[str, Tensor], live: dict[str, Tensor]
    ):
        self.ranks, self.rank, self.names = layout.engine, rank % layout.engine, list(live)
        one = next(iter(live.values()))
        self.weights = WeightChecksums(max(max(matrix(x).shape) for x in live.values()), one.dtype, one.device)
        self.before: Tensor | None = None
        place = {name: number for number, name in enumerate(self.names)}

        def term(tensor: Tensor, source: Offset, target: Offset, rows: int, columns: int) -> Term:
            return self.weights.term(tensor, source, target.row, target.column, rows, columns)

        own = [
            (place[spot.tensor], term(live[spot.tensor], spot, spot, rows, columns))
            for _, (_, _, rows, columns), spot in vllm_layout.pieces(layout.arch, layout.engine, self.rank)
            if rows
        ]
        answered = [
            (
                check.engine * len(place) + place[check.target.tensor],
                term(held[check.source.tensor], check.source, check.target, check.rows, check.columns),
            )
            for check in plan.checks
        ]
        self.own, self.answered = self._numbered(own), self._numbered(answered)

    @torch.no_grad()
    def differing(self) -> list[Difference]:
        """This rank's engine parameters that are not the trainer's weights. Collective."""
        expected, own = self.answered_sums(), self.own_sums()
        dist.all_reduce(expected)
        found = differences(self.names, expected[self.rank], own, self.before)
        self.before = own
        return found

    @torch.no_grad()
    def own_sums(self) -> Tensor:
        """[parameters] int64 of this rank's engine, without padding."""
        return self.weights.sums(*self.own, len(self.names))

    @torch.no_grad()
    def answered_sums(self) -> Tensor:
        """[E, parameters] int64 of every rank of a replica: this rank's part of what the trainer expects."""
        return self.weights.sums(*self.answered, self.ranks * len(self.names)).view(self.ranks, -1)

    def _numbered(self, terms: list[tuple[int, Term]]) -> tuple[Tensor, list[Term]]:
        return torch.tensor([number for number, _ in terms], device=self.weights.device), [term for _, term in terms]


def differences(names: Sequence[str], expected: Tensor, own: Tensor, before: Tensor | None) -> list[Difference]:
    """Where sums differ, and whether the own one is that of the proof `before`."""
    unchanged = own == before if before is not None else torch.zeros_like(own, dtype=torch.bool)
    wrong = (expected != own).nonzero().flatten().tolist()
    return [Difference(names[number], bool(unchanged[number])) for number in wrong]


def _mixed(position: Tensor, salt: int) -> Tensor:
    """int64 that looks drawn at random, a function of the position."""
    mixed = (position + salt) * 0x1E3779B97F4A7C15
    mixed = (mixed ^ (mixed >> 29)) * 0x3F58476D1CE4E5B9
    return mixed ^ (mixed >> 32)

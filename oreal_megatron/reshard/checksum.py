"""Proof that the engine holds the trainer's weights: a checksum of every parameter, computed on both sides.

The checksum of a matrix is the sum over its 16-bit words of  word * a(row) * b(column)  modulo 2^64, with odd weights
a and b drawn from the position within the engine's parameter. It is exact in any order and adds up over slices, so the
trainer's ranks each sum what they hold and only the sums are reduced. One changed element always changes it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from oreal_megatron.reshard import vllm_layout
from oreal_megatron.reshard.pieces import Spot, cut, matrix
from oreal_megatron.reshard.plan import Plan
from oreal_megatron.reshard.slices import Layout

CHUNK_WORDS = 2**24  # of a slice at a time: 64 MiB of products


class Term(NamedTuple):
    """A slice that is summed: its elements, and the weights of where it lies in the engine's parameter."""

    part: Tensor  # [r, c], or [r, c * words of an element] int16
    across: Tensor  # [c * words] int32
    down: Tensor  # [r] int64


class Checksums:
    """Checksums of this rank's engine parameters (`live`), and of what it holds of the trainer's (`held`).

    Holds views of the tensors, as reshard/direct.py does.
    """

    def __init__(self, layout: Layout, plan: Plan, rank: int, held: dict[str, Tensor], live: dict[str, Tensor]):
        self.ranks, self.rank, self.names = layout.engine, rank % layout.engine, list(live)
        self.dtype, self.device = next((x.dtype, x.device) for x in live.values())
        self.words = self.dtype.itemsize // 2
        position = torch.arange(max(max(matrix(x).shape) for x in live.values()) * self.words, device=self.device)
        self.down = _mixed(position, 0x5BF03635) | 1
        self.across = (_mixed(position, 0x2545F491) >> 20 & 0x7FFF | 1).int()  # below 2^15: products fit 32 bits
        place = {name: number for number, name in enumerate(self.names)}
        own = [
            (place[spot.tensor], self._term(live[spot.tensor], spot, spot, rows, columns))
            for _, (_, _, rows, columns), spot in vllm_layout.pieces(layout.arch, layout.engine, self.rank)
            if rows
        ]
        answered = [
            (
                check.engine * len(place) + place[check.target.tensor],
                self._term(held[check.source.tensor], check.source, check.target, check.rows, check.columns),
            )
            for check in plan.checks
        ]
        self.own, self.answered = self._numbered(own), self._numbered(answered)

    @torch.no_grad()
    def differing(self) -> list[str]:
        """Names of this rank's engine parameters that are not the trainer's weights. Collective."""
        expected = self.answered_sums()
        dist.all_reduce(expected)
        wrong = expected[self.rank] != self.own_sums()
        return [self.names[number] for number in wrong.nonzero().flatten().tolist()]

    @torch.no_grad()
    def own_sums(self) -> Tensor:
        """[parameters] int64 of this rank's engine, without padding."""
        return self._sums(*self.own, len(self.names))

    @torch.no_grad()
    def answered_sums(self) -> Tensor:
        """[E, parameters] int64 of every rank of a replica: this rank's part of what the trainer expects."""
        return self._sums(*self.answered, self.ranks * len(self.names)).view(self.ranks, -1)

    def _term(self, tensor: Tensor, source: Spot, target: Spot, rows: int, columns: int) -> Term:
        part = cut(matrix(tensor), source, rows, columns)
        if part.dtype == self.dtype:
            part = part.view(torch.int16)
        first, last = target.column * self.words, (target.column + columns) * self.words
        return Term(part, self.across[first:last], self.down[target.row : target.row + rows])

    def _numbered(self, terms: list[tuple[int, Term]]) -> tuple[Tensor, list[Term]]:
        return torch.tensor([number for number, _ in terms], device=self.device), [term for _, term in terms]

    def _sums(self, where: Tensor, terms: Iterable[Term], size: int) -> Tensor:
        total = torch.zeros(size, dtype=torch.int64, device=self.device)
        if sums := [self._sum(*term) for term in terms]:
            total.index_add_(0, where, torch.stack(sums))
        return total

    def _sum(self, part: Tensor, across: Tensor, down: Tensor) -> Tensor:
        if part.dtype != torch.int16:  # the trainer's type is another: what travels is cast
            part = part.to(self.dtype).view(torch.int16)
        step = max(CHUNK_WORDS // len(across), 1)
        if step >= len(down):
            return ((part * across).sum(1, dtype=torch.int64) * down).sum()
        chunks = zip(part.split(step), down.split(step), strict=True)
        return torch.stack([((words * across).sum(1, dtype=torch.int64) * rows).sum() for words, rows in chunks]).sum()


def _mixed(position: Tensor, salt: int) -> Tensor:
    """int64 that looks drawn at random, a function of the position."""
    mixed = (position + salt) * 0x1E3779B97F4A7C15
    mixed = (mixed ^ (mixed >> 29)) * 0x3F58476D1CE4E5B9
    return mixed ^ (mixed >> 32)

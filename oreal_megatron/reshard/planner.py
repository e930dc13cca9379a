"""Planner of the direct transport: which overlap travels from which rank to which, in which batch.

The plan is a pure function of the layouts, so every rank computes its own part without communication. Batches are the
same on every rank and bounded in bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

from oreal_megatron.reshard.overlaps import Overlap, ReshardLayout, StageAndTensorRank, overlaps
from oreal_megatron.reshard.routes import (
    RELAY_DELAY,
    Ledger,
    Ranks,
    Route,
    Traffic,
    max_transfers_per_rank,
    routes,
)
from oreal_megatron.reshard.shards import Offset

LOOK_BACK = 4  # earlier batches that may still have room for an overlap
BUFFERS = 4  # of the direct transport: two batches in flight, each with one buffer to send and one to receive


class Move(NamedTuple):
    """One end of a transfer: a region of one of this rank's tensors."""

    peer: int
    offset: Offset
    rows: int
    columns: int
    relayed: bool  # the offset lies in an engine parameter although it is sent


class Copy(NamedTuple):
    """An overlap that this rank both holds and needs."""

    source: Offset
    target: Offset
    rows: int
    columns: int


class ChecksumPart(NamedTuple):
    """An overlap for whose checksum this rank's trainer is responsible, and its target on a rank of each replica."""

    engine_rank: int
    source: Offset
    target: Offset
    rows: int
    columns: int


@dataclass
class TransferBatch:
    """Sends, receives and copies of this rank; for each peer in the same order as the peer's."""

    sends: list[Move] = field(default_factory=list)
    receives: list[Move] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)


@dataclass(frozen=True)
class TransferPlan:
    """One rank's part of a weight transfer, and the traffic of all ranks."""

    batches: list[TransferBatch]
    checksum_parts: list[ChecksumPart]
    traffic: Traffic


class _BoundedOverlap(NamedTuple):
    part: Overlap
    holders: Ranks
    destinations: Ranks
    shard_of: dict[int, StageAndTensorRank]  # by holder


def plan_transfer(layout: ReshardLayout, rank: int, itemsize: int, batch_bytes: int) -> TransferPlan:
    """Plan the transfers of one rank.

    `itemsize` is that of the engine's elements, to which the trainer's are cast before they travel. No rank sends or
    receives more than `batch_bytes` in one batch.
    """
    ledger, batches, first = Ledger(layout, batch_bytes), [TransferBatch()], 0
    checksum_parts: list[ChecksumPart] = []
    for part, holders, destinations, shard_of in _bounded_overlaps(layout, itemsize, batch_bytes):
        size = part.rows * part.columns * itemsize
        turn = ledger.next_turn(holders, destinations, size)
        first = ledger.assign_batch(holders, destinations, turn, size, max(first - LOOK_BACK, 0))
        batches += [TransferBatch() for _ in range(first + RELAY_DELAY + 1 - len(batches))]
        for route in _routes_of_rank(holders, destinations, layout.node, turn, rank):
            _add(batches[first + RELAY_DELAY * route.relayed], route, rank, part, shard_of, layout.engine)
        responsible = holders[turn % len(holders)]
        if responsible == rank:
            source = part.holders[shard_of[rank]]
            checksum_parts += [ChecksumPart(e, source, target, *part[:2]) for e, target in part.targets.items()]
    return TransferPlan(batches, checksum_parts, ledger.traffic())


def _bounded_overlaps(layout: ReshardLayout, itemsize: int, limit: int) -> Iterator[_BoundedOverlap]:
    """Yield overlaps, split by rows so that no rank sends or receives more than `limit` bytes of one."""
    for part in overlaps(layout):
        holders, destinations, shard_of = _ranks(layout, tuple(part.holders), tuple(part.targets))
        copies = max(max_transfers_per_rank(holders, destinations, layout.node, layout.world), 1)
        step = max(limit // (part.columns * itemsize * copies), 1)
        for row in range(0, part.rows, step):
            sources = {shard: _shifted(offset, row) for shard, offset in part.holders.items()} if row else part.holders
            targets = {rank: _shifted(offset, row) for rank, offset in part.targets.items()} if row else part.targets
            rows = Overlap(min(step, part.rows - row), part.columns, sources, targets)
            yield _BoundedOverlap(rows, holders, destinations, shard_of)


def _shifted(offset: Offset, rows: int) -> Offset:
    return offset._replace(row=offset.row + rows)


@cache
def _ranks(
    layout: ReshardLayout, holders: tuple[StageAndTensorRank, ...], engine_ranks: Ranks
) -> tuple[Ranks, Ranks, dict[int, StageAndTensorRank]]:
    """Return the global ranks that hold an overlap, those that need it, and the shard of each holder."""
    shard_of = {rank: holder for holder in holders for rank in layout.replica_ranks(*holder)}
    destinations = tuple(first + rank for first in range(0, layout.world, layout.engine) for rank in engine_ranks)
    return tuple(sorted(shard_of)), destinations, shard_of


@cache
def _routes_of_rank(holders: Ranks, destinations: Ranks, node: int, turn: int, rank: int) -> tuple[Route, ...]:
    return tuple(route for route in routes(holders, destinations, node, turn) if rank in route[:2])


def _add(
    batch: TransferBatch,
    route: Route,
    rank: int,
    part: Overlap,
    shard_of: dict[int, StageAndTensorRank],
    engine_ranks: int,
) -> None:
    if route.source == route.destination:
        batch.copies.append(Copy(part.holders[shard_of[rank]], part.targets[rank % engine_ranks], *part[:2]))
    elif route.source == rank:
        source = part.targets[rank % engine_ranks] if route.relayed else part.holders[shard_of[rank]]
        batch.sends.append(Move(route.destination, source, *part[:2], route.relayed))
    else:
        batch.receives.append(Move(route.source, part.targets[rank % engine_ranks], *part[:2], False))

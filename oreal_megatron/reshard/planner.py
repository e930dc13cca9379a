"""Which slice travels from which rank to which: a pure function of the layouts, the same on every rank.

Slices travel in batches that are the same on every rank and bounded in bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

from oreal_megatron.reshard.overlaps import Overlap, ReshardLayout, overlaps
from oreal_megatron.reshard.routes import RELAY_DELAY, Ledger, Route, Traffic, most, routes
from oreal_megatron.reshard.shards import Offset

LOOK_BACK = 4  # batches that may still have room for a slice


class Move(NamedTuple):
    """One end of a slice's travel: a part of one of this rank's tensors."""

    peer: int
    spot: Offset
    rows: int
    columns: int
    relayed: bool  # the spot is in an engine parameter although it is sent


class Copy(NamedTuple):
    """A slice that this rank holds and needs."""

    source: Offset
    target: Offset
    rows: int
    columns: int


class Check(NamedTuple):
    """A slice that this rank's share of the trainer answers for, and where rank `engine` of a replica keeps it."""

    engine: int
    source: Offset
    target: Offset
    rows: int
    columns: int


@dataclass
class TransferBatch:
    """What this rank sends, receives and copies; for each peer in the same order as the peer's."""

    sends: list[Move] = field(default_factory=list)
    receives: list[Move] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)


@dataclass(frozen=True)
class TransferPlan:
    """Everything one rank needs to take part in a transfer, and the traffic of all ranks."""

    batches: list[TransferBatch]
    checks: list[Check]
    traffic: Traffic


def make(layout: ReshardLayout, rank: int, itemsize: int, batch_bytes: int) -> TransferPlan:
    """The plan of one rank. `itemsize` is of the engine's elements, to which the trainer's are cast before they travel;
    no rank sends or receives more than `batch_bytes` in one batch."""
    ledger, batches, checks, first = Ledger(layout, batch_bytes), [TransferBatch()], [], 0
    for part, holders, destinations, owners in _bounded(layout, itemsize, batch_bytes):
        size = part.rows * part.columns * itemsize
        turn = ledger.turn(holders, destinations, size)
        first = ledger.enter(holders, destinations, turn, size, max(first - LOOK_BACK, 0))
        batches += [TransferBatch() for _ in range(first + RELAY_DELAY + 1 - len(batches))]
        for route in _own(holders, destinations, layout.node, turn, rank):
            batch = batches[first + RELAY_DELAY * route.relayed]
            _add(batch, route, rank, part, part.holders.get(owners.get(rank)), layout.engine)
        if (answering := holders[turn % len(holders)]) == rank:
            source = part.holders[owners[answering]]
            checks += [Check(e, source, target, *part[:2]) for e, target in part.targets.items()]
    return TransferPlan(batches, checks, ledger.traffic())


def _bounded(layout: ReshardLayout, itemsize: int, limit: int) -> Iterator[tuple]:
    """(slice, ranks that hold it, ranks that need it, which shard each holder has); slices are cut by rows so that no
    rank sends or receives more than `limit` bytes of one."""
    for part in overlaps(layout):
        holders, destinations, owners = _ranks(layout, tuple(part.holders), tuple(part.targets))
        copies = max(most(holders, destinations, layout.node, layout.world), 1)
        step = max(limit // (part.columns * itemsize * copies), 1)
        for row in range(0, part.rows, step):
            lower = [
                {key: spot._replace(row=spot.row + row) for key, spot in spots.items()} if row else spots
                for spots in (part.holders, part.targets)
            ]
            yield Overlap(min(step, part.rows - row), part.columns, *lower), holders, destinations, owners


@cache
def _ranks(layout: ReshardLayout, places: tuple, targets: tuple) -> tuple:
    owners = {rank: place for place in places for rank in layout.ranks(*place)}
    destinations = tuple(first + target for first in range(0, layout.world, layout.engine) for target in targets)
    return tuple(sorted(owners)), destinations, owners


@cache
def _own(holders: tuple, destinations: tuple, node: int, turn: int, rank: int) -> tuple[Route, ...]:
    return tuple(route for route in routes(holders, destinations, node, turn) if rank in route[:2])


def _add(batch: TransferBatch, route: Route, rank: int, part: Overlap, held: Offset | None, engine: int) -> None:
    target = part.targets.get(rank % engine)
    if route.source == route.destination:
        batch.copies.append(Copy(held, target, *part[:2]))
    elif route.source == rank:
        batch.sends.append(Move(route.destination, target if route.relayed else held, *part[:2], route.relayed))
    else:
        batch.receives.append(Move(route.source, target, *part[:2], False))

"""Routes of overlaps to the ranks that need them, and the traffic they cause on each rank.

An overlap comes from a holder on the same node if there is one. Otherwise it crosses between nodes once, to one of the
ranks of the node that need it, and is relayed from that rank's engine parameter to the others. Holders and relays take
turns, so that the load is even.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from oreal_megatron.reshard.overlaps import ReshardLayout

RELAY_DELAY = 2  # batches; two are in flight at once, so the one before the last has arrived

Ranks = tuple[int, ...]
RankArray = NDArray[np.float64]
CountArray = NDArray[np.int64]


class Route(NamedTuple):
    """One transfer of an overlap between two ranks."""

    source: int
    destination: int
    relayed: bool  # the source is an engine parameter that received the overlap earlier


@dataclass(frozen=True)
class Traffic:
    """[W] bytes that each rank sends and receives, in total and between nodes, with their lower bounds."""

    sent: RankArray
    received: RankArray
    sent_between: RankArray
    received_between: RankArray
    minimum_received: RankArray
    minimum_between: int  # over all ranks: each byte enters a node once

    def lower_bounds(self) -> dict[str, float]:
        """Return as metrics the bytes that some rank, and all nodes together, must receive at least."""
        return {
            "weight_sync/least_received_bytes": float(self.minimum_received.max()),
            "weight_sync/least_between_nodes_bytes": float(self.minimum_between),
        }


@cache
def routes(holders: Ranks, destinations: Ranks, node: int, turn: int) -> tuple[Route, ...]:
    """Return the routes of an overlap to every destination; `turn` chooses among equivalent holders and relays."""
    result: list[Route] = []
    nodes = sorted({rank // node for rank in destinations})
    for number, node_index in enumerate(nodes):
        receivers = [rank for rank in destinations if rank // node == node_index]
        local_holders = [rank for rank in holders if rank // node == node_index]
        if local_holders:
            for position, rank in enumerate(receivers):
                source = rank if rank in local_holders else local_holders[(turn + position) % len(local_holders)]
                result.append(Route(source, rank, False))
        else:
            relay = receivers[turn % len(receivers)]
            result.append(Route(holders[(turn + number) % len(holders)], relay, False))
            result += [Route(relay, rank, True) for rank in receivers if rank != relay]
    return tuple(result)


class Ledger:
    """Bytes assigned so far to every turn and every batch."""

    def __init__(self, layout: ReshardLayout, batch_bytes: int):
        self.layout, self.batch_bytes = layout, batch_bytes
        self.turn_bytes: dict[tuple[Ranks, Ranks], list[int]] = {}  # of each turn, by holders and destinations
        self.batch_loads: list[CountArray] = []  # [2, W] bytes sent and received, by batch
        self.first_empty = 0  # the first batch without any overlap

    def next_turn(self, holders: Ranks, destinations: Ranks, size: int) -> int:
        """Assign `size` bytes to the turn that has carried least, and return the turn."""
        key = holders, destinations
        if key not in self.turn_bytes:
            self.turn_bytes[key] = [0] * _turn_count(holders, destinations, self.layout.node)
        carried = self.turn_bytes[key]
        turn = carried.index(min(carried))
        carried[turn] += size
        return turn

    def assign_batch(self, holders: Ranks, destinations: Ranks, turn: int, size: int, batch: int) -> int:
        """Return the first batch, from `batch` on, with room for an overlap; an empty one always has room."""
        direct, relayed, _ = transfer_counts(holders, destinations, self.layout.node, self.layout.world, turn)
        while True:
            while len(self.batch_loads) <= batch + RELAY_DELAY:
                self.batch_loads.append(np.zeros((2, self.layout.world), np.int64))
            now, later = self.batch_loads[batch] + direct * size, self.batch_loads[batch + RELAY_DELAY] + relayed * size
            if max(now.max(), later.max()) <= self.batch_bytes or batch >= self.first_empty:
                self.batch_loads[batch], self.batch_loads[batch + RELAY_DELAY] = now, later
                self.first_empty = max(self.first_empty, batch + RELAY_DELAY + 1)
                return batch
            batch += 1

    def traffic(self) -> Traffic:
        """Return the traffic of everything assigned."""
        world, node = self.layout.world, self.layout.node
        totals, crossing, minimum, between = np.zeros((2, world)), np.zeros((2, world)), np.zeros(world), 0
        for (holders, destinations), carried in self.turn_bytes.items():
            for turn, size in enumerate(carried):
                direct, relayed, across = transfer_counts(holders, destinations, node, world, turn)
                totals += (direct + relayed) * size
                crossing += across * size
            minimum[[rank for rank in destinations if rank not in holders]] += sum(carried)
            nodes_without = {rank // node for rank in destinations} - {rank // node for rank in holders}
            between += len(nodes_without) * sum(carried)
        return Traffic(totals[0], totals[1], crossing[0], crossing[1], minimum, between)


@cache
def _turn_count(holders: Ranks, destinations: Ranks, node: int) -> int:
    """Return the number of turns after which every rank has played each of its parts equally often."""
    receivers = [
        sum(rank // node == index for rank in destinations) for index in {rank // node for rank in destinations}
    ]
    sources = [sum(rank // node == index for rank in holders) for index in {rank // node for rank in holders}]
    return math.lcm(len(holders), *receivers, *sources)


@cache
def max_transfers_per_rank(holders: Ranks, destinations: Ranks, node: int, world: int) -> int:
    """Return how often one rank may send or receive an overlap within a batch, over all turns."""
    turns = range(_turn_count(holders, destinations, node))
    return max(int(x.max()) for turn in turns for x in transfer_counts(holders, destinations, node, world, turn)[:2])


@cache
def transfer_counts(
    holders: Ranks, destinations: Ranks, node: int, world: int, turn: int
) -> tuple[CountArray, CountArray, CountArray]:
    """Return [2, W] sends and receives of each rank: direct, relayed, and (of both) between nodes."""
    direct, relayed, across = np.zeros((3, 2, world), np.int64)
    for source, destination, is_relayed in routes(holders, destinations, node, turn):
        if source != destination:
            for counts in [relayed if is_relayed else direct] + [across] * (source // node != destination // node):
                counts[0, source] += 1
                counts[1, destination] += 1
    return direct, relayed, across

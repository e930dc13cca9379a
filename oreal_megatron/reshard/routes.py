"""How slices reach the ranks that need them, and what that costs each rank.

A slice comes from a holder on the same node if there is one; otherwise it crosses between nodes once, to one of the
ranks of the node that need it, and goes on from that rank's engine parameter to the others. Holders and relays take
turns, so that load is even.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np

from oreal_megatron.reshard.overlaps import ReshardLayout

RELAY_DELAY = 2  # batches; two are under way at once, so the one before the last has arrived


class Route(NamedTuple):
    source: int
    destination: int
    relayed: bool  # the source is an engine parameter, which received the slice before


@dataclass(frozen=True)
class Traffic:
    """[W] bytes that each rank sends and receives, and how many of them between nodes; with what cannot be avoided."""

    sent: np.ndarray
    received: np.ndarray
    sent_between: np.ndarray
    received_between: np.ndarray
    minimum_received: np.ndarray
    minimum_between: int  # over all ranks: each byte enters a node once

    def least(self) -> dict[str, float]:
        """Metrics: the bytes that some rank must receive at least, and that all nodes together must."""
        return {
            "weight_sync/least_received_bytes": float(self.minimum_received.max()),
            "weight_sync/least_between_nodes_bytes": float(self.minimum_between),
        }


@cache
def routes(holders: tuple[int, ...], destinations: tuple[int, ...], node: int, turn: int) -> tuple[Route, ...]:
    """How a slice reaches every destination; `turn` says whose turn it is among equals."""
    found, nodes = [], sorted({rank // node for rank in destinations})
    for number, here in enumerate(nodes):
        needing = [rank for rank in destinations if rank // node == here]
        near = [rank for rank in holders if rank // node == here]
        if near:
            for place, rank in enumerate(needing):
                source = rank if rank in near else near[(turn + place) % len(near)]
                found.append(Route(source, rank, False))
        else:
            relay = needing[turn % len(needing)]
            found.append(Route(holders[(turn + number) % len(holders)], relay, False))
            found += [Route(relay, rank, True) for rank in needing if rank != relay]
    return tuple(found)


class Ledger:
    """Whose turn it is, which batch has room, and what all ranks send and receive."""

    def __init__(self, layout: ReshardLayout, batch_bytes: int):
        self.layout, self.limit = layout, batch_bytes
        self.turns: dict[tuple, list[int]] = {}  # bytes that each turn carried, by holders and destinations
        self.loads: list[np.ndarray] = []  # [2, W] bytes sent and received, by batch
        self.fresh = 0  # the first batch that no slice has used

    def turn(self, holders: tuple, destinations: tuple, size: int) -> int:
        key = holders, destinations
        if key not in self.turns:
            self.turns[key] = [0] * _turns(holders, destinations, self.layout.node)
        carried = self.turns[key]
        turn = carried.index(min(carried))
        carried[turn] += size
        return turn

    def enter(self, holders: tuple, destinations: tuple, turn: int, size: int, batch: int) -> int:
        """The first batch from `batch` on that has room for a slice; an empty one always has."""
        direct, relayed, _ = tally(holders, destinations, self.layout.node, self.layout.world, turn)
        while True:
            while len(self.loads) <= batch + RELAY_DELAY:
                self.loads.append(np.zeros((2, self.layout.world), np.int64))
            now, later = self.loads[batch] + direct * size, self.loads[batch + RELAY_DELAY] + relayed * size
            if max(now.max(), later.max()) <= self.limit or batch >= self.fresh:
                self.loads[batch], self.loads[batch + RELAY_DELAY] = now, later
                self.fresh = max(self.fresh, batch + RELAY_DELAY + 1)
                return batch
            batch += 1

    def traffic(self) -> Traffic:
        world, node = self.layout.world, self.layout.node
        totals, crossing, minimum, between = np.zeros((2, world)), np.zeros((2, world)), np.zeros(world), 0
        for (holders, destinations), carried in self.turns.items():
            for turn, size in enumerate(carried):
                direct, relayed, across = tally(holders, destinations, node, world, turn)
                totals += (direct + relayed) * size
                crossing += across * size
            minimum[[rank for rank in destinations if rank not in holders]] += sum(carried)
            strangers = {rank // node for rank in destinations} - {rank // node for rank in holders}
            between += len(strangers) * sum(carried)
        return Traffic(*totals, *crossing, minimum, between)


@cache
def _turns(holders: tuple, destinations: tuple, node: int) -> int:
    """After so many turns every rank has had each of its parts equally often."""
    crowds = [sum(rank // node == here for rank in destinations) for here in {rank // node for rank in destinations}]
    near = [sum(rank // node == here for rank in holders) for here in {rank // node for rank in holders}]
    return math.lcm(len(holders), *crowds, *near)


@cache
def most(holders: tuple, destinations: tuple, node: int, world: int) -> int:
    """How often one rank may send or receive a slice in one batch, whoever's turn it is."""
    turns = range(_turns(holders, destinations, node))
    return max(int(x.max()) for turn in turns for x in tally(holders, destinations, node, world, turn)[:2])


@cache
def tally(holders: tuple, destinations: tuple, node: int, world: int, turn: int) -> tuple[np.ndarray, ...]:
    """[2, W] slices that each rank sends and receives: straight, relayed, and (of both) between nodes."""
    straight, relayed, across = np.zeros((3, 2, world), np.int64)
    for source, destination, late in routes(holders, destinations, node, turn):
        if source != destination:
            for counted in [relayed if late else straight] + [across] * (source // node != destination // node):
                counted[0, source] += 1
                counted[1, destination] += 1
    return straight, relayed, across

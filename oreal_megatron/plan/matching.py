"""Whether what ranks would say to each other fits together; sentences about what does not.

Pure functions of what mcore/rehearse_rank.py recorded and of reshard's plans. Only what was rehearsed is compared: of a
group the members that were, of a message both ends.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from oreal_megatron.reshard import planner, shards, vllm_layout
from oreal_megatron.reshard.overlaps import ReshardLayout

if TYPE_CHECKING:
    from oreal_megatron.mcore.fake_world import Call
    from oreal_megatron.mcore.rehearse_rank import CheckpointShard, RankRehearsal

PEERS = 8  # whose plans are made as well; each takes a third of a second at 128 ranks
MESSAGES = ("send", "recv_")


def groups(ranks: Sequence[RankRehearsal]) -> Iterator[str]:
    """Creating a group is collective: every rank must ask for the same ones in the same order."""
    first = ranks[0]
    for other in ranks[1:]:
        for place, (one, two) in enumerate(itertools.zip_longest(first.groups, other.groups)):
            if one != two:
                yield (
                    f"process group {place} is {_members(one)} on rank {first.rank}, and {_members(two)} on rank "
                    f"{other.rank}; all ranks must make the same groups in the same order"
                )
                break


def collectives(ranks: Sequence[RankRehearsal]) -> Iterator[str]:
    """Play all ranks' collectives: one is done when every member that was rehearsed has come to the same one."""
    waiting = {one.rank: [call for call in one.calls if call.operation not in MESSAGES] for one in ranks}
    place = dict.fromkeys(waiting, 0)

    def next_of(rank: int) -> Call | None:
        return waiting[rank][place[rank]] if place[rank] < len(waiting[rank]) else None

    moved = True
    while moved:
        moved = False
        for rank in waiting:
            while (call := next_of(rank)) is not None:
                members = [other for other in call.group if other in waiting]
                if any(next_of(other) != call for other in members):
                    break
                for other in members:
                    place[other] += 1
                moved = True
    stuck = [
        (next_of(other) is None or next_of(other).group != call.group, rank, other)
        for rank in waiting
        if (call := next_of(rank)) is not None
        for other in itertools.islice((x for x in call.group if x in waiting and next_of(x) != call), 1)
    ]
    for _, rank, other in sorted(stuck):  # first who disagree, then who wait for them
        yield (
            f"rank {rank} waits in its collective {place[rank]}, {_said(next_of(rank))}, for rank {other}, which is at "
            f"its {place[other]}, {_said(next_of(other))}"
        )


def messages(ranks: Sequence[RankRehearsal]) -> Iterator[str]:
    """What one rank sends another must be what the other receives from it: number, order and sizes."""
    sent, received = defaultdict(list), defaultdict(list)
    known = {one.rank for one in ranks}
    for one in ranks:
        for call in one.calls:
            if call.operation == "send" and call.peer in known:
                sent[one.rank, call.peer].append(call.sizes)
            elif call.operation == "recv_" and call.peer in known:
                received[call.peer, one.rank].append(call.sizes)
    for ends in sorted(sent.keys() | received.keys()):
        yield from _differing(sent[ends], received[ends], *ends)


def _differing(sent: list, received: list, source: int, destination: int) -> Iterator[str]:
    for place, (one, two) in enumerate(itertools.zip_longest(sent, received)):
        if one != two:
            yield (
                f"message {place} from rank {source} to rank {destination}: {_bytes(one)} are sent, {_bytes(two)} are "
                "waited for"
            )
            return


def micro_batches(ranks: Sequence[RankRehearsal]) -> Iterator[str]:
    """Different numbers on data-parallel replicas deadlock Megatron's schedules."""
    numbers = {one.rank: len(one.tokens) for one in ranks if one.tokens}
    if len(set(numbers.values())) > 1:
        yield f"ranks have different numbers of micro-batches: {numbers}"


def checkpoint(ranks: Sequence[RankRehearsal]) -> Iterator[str]:
    """The parts that ranks write, all those of one replica among them, must cover every tensor once."""
    parts: dict[str, dict[int, list[CheckpointShard]]] = defaultdict(lambda: defaultdict(list))
    for one in ranks:
        for shard in one.shards:
            parts[shard.key][one.rank].append(shard)
    for key, by_rank in parts.items():
        shards = [(rank, shard) for rank, mine in by_rank.items() for shard in mine]
        if len(shapes := {shard.shape for _, shard in shards}) > 1:
            yield f"{key} has different shapes on different ranks: {sorted(shapes)}"
            continue
        written = [(rank, shard) for rank, shard in shards if shard.written]
        for (one, first), (two, second) in itertools.combinations(written, 2):
            if _overlap(first, second):
                yield f"{key}: ranks {one} and {two} both write what begins at {first.offset} and {second.offset}"
        there, wanted = sum(math.prod(shard.size) for _, shard in written), math.prod(shards[0][1].shape)
        if there < wanted:
            writers = sorted({rank for rank, _ in written})
            yield f"{key}: only {there} of its {wanted} elements are written, by ranks {writers}"


def _overlap(one: CheckpointShard, two: CheckpointShard) -> bool:
    return all(
        start < other + extent and other < start + size
        for start, size, other, extent in zip(one.offset, one.size, two.offset, two.size, strict=True)
    )


def handover(layout: ReshardLayout, ranks: Sequence[RankRehearsal], itemsize: int, batch_bytes: int) -> Iterator[str]:
    """The transfers to the engine: among these ranks, and between the first of them and some of its peers, both ends
    agree; every slice lies in a tensor of the trainer's real model, or of the engine's layout."""
    plans = {one.rank: planner.plan_transfer(layout, one.rank, itemsize, batch_bytes) for one in ranks}
    for one in ranks:
        yield from _outside(one, plans[one.rank], layout)
    first = plans[ranks[0].rank]
    peers = {move.peer for batch in first.batches for move in (*batch.sends, *batch.receives)} - plans.keys()
    spread = sorted(peers)[:: max(len(peers) // PEERS, 1)]
    plans |= {peer: planner.plan_transfer(layout, peer, itemsize, batch_bytes) for peer in spread}
    sends, receives = ({rank: _moves(made, way) for rank, made in plans.items()} for way in ("sends", "receives"))
    known = {one.rank for one in ranks}
    for source, destination in itertools.permutations(plans, 2):
        if {source, destination} <= known or ranks[0].rank in (source, destination):
            yield from _differing(sends[source][destination], receives[destination][source], source, destination)


def _moves(made: planner.TransferPlan, way: str) -> dict[int, list[tuple]]:
    """(batch, rows, columns) of every slice, by peer."""
    found: dict[int, list[tuple]] = defaultdict(list)
    for number, batch in enumerate(made.batches):
        for move in getattr(batch, way):
            found[move.peer].append((number, move.rows, move.columns))
    return found


def _outside(one: RankRehearsal, made: planner.TransferPlan, layout: ReshardLayout) -> Iterator[str]:
    """Slices that lie in no tensor of the trainer's real model, or of the engine's layout."""
    engine = vllm_layout.parameter_shapes(layout.arch, layout.engine)
    for batch in made.batches:
        found = [(copy.source, copy.rows, copy.columns, one.shapes) for copy in batch.copies]
        found += [
            (move.offset, move.rows, move.columns, engine if move.relayed else one.shapes) for move in batch.sends
        ]
        found += [(move.offset, move.rows, move.columns, engine) for move in batch.receives]
        for spot, rows, columns, shapes in found:
            if why := _not_in(spot, rows, columns, shapes):
                yield f"rank {one.rank}: {why}"
                return


def _not_in(spot: shards.Offset, rows: int, columns: int, shapes: dict[str, tuple[int, ...]]) -> str:
    shape = shapes.get(spot.tensor)
    if shape is None:
        return f"the transfer to the engine reads or writes {spot.tensor}, which is not there"
    if spot.row + rows > shape[0] or spot.column + columns > math.prod(shape[1:]):
        return f"{spot.tensor} has the shape {shape}, and the transfer goes to row {spot.row + rows} of it"
    return ""


def _members(group: tuple[int, ...] | None) -> str:
    if group is None:
        return "not there"
    return str(list(group)) if len(group) <= 8 else f"[{group[0]}, {group[1]}, ... {group[-1]}] of {len(group)}"


def _said(call: Call | None) -> str:
    if call is None:
        return "the end"
    how = (*sorted(set(call.dtypes)), f"from root {call.root}" if call.root >= 0 else "")
    return " ".join(filter(None, (call.operation, "of", _bytes(call.sizes), *how, "over", _members(call.group))))


def _bytes(sizes: tuple[int, ...] | None) -> str:
    return "none" if sizes is None else f"{list(sizes)} bytes"

"""Compare the communication of rehearsed ranks; yield a message for each mismatch.

Pure functions of the records of mcore/rehearse_rank.py and of reshard's plans. Only rehearsed ranks are compared: the
rehearsed members of a group, messages with both ends rehearsed.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from oreal_megatron.reshard import planner, shards, vllm_layout
from oreal_megatron.reshard.overlaps import ReshardLayout

if TYPE_CHECKING:
    from oreal_megatron.mcore.fake_world import Call
    from oreal_megatron.mcore.rehearse_rank import CheckpointShard, RankRehearsal

PEERS = 8  # peers whose plans are made as well; each takes a third of a second at 128 ranks
MESSAGES = ("send", "recv_")


def groups(ranks: Sequence[RankRehearsal]) -> Iterator[str]:
    """Check that every rank creates the same groups in the same order, because that is collective."""
    first = ranks[0]
    for other in ranks[1:]:
        for number, (entry, peer_entry) in enumerate(itertools.zip_longest(first.groups, other.groups)):
            if entry != peer_entry:
                yield (
                    f"process group {number} is {_members(entry)} on rank {first.rank}, and {_members(peer_entry)} on "
                    f"rank {other.rank}; all ranks must create the same groups in the same order"
                )
                break


def collectives(ranks: Sequence[RankRehearsal]) -> Iterator[str]:
    """Simulate the collectives: one completes when every rehearsed member has reached it."""
    queues = _Queues(ranks)
    while queues.complete():
        pass
    for _, rank, other in sorted(queues.blocked()):  # first ranks that disagree, then those that wait for them
        yield (
            f"rank {rank} waits in its collective {queues.position[rank]}, {_describe(queues.next_of(rank))}, for rank "
            f"{other}, which is at its {queues.position[other]}, {_describe(queues.next_of(other))}"
        )


class _Queues:
    """Collectives of each rehearsed rank in their order, of which some are complete."""

    def __init__(self, ranks: Sequence[RankRehearsal]):
        self.calls = {entry.rank: [call for call in entry.calls if call.operation not in MESSAGES] for entry in ranks}
        self.position = dict.fromkeys(self.calls, 0)  # of the collective that a rank waits in

    def next_of(self, rank: int) -> Call | None:
        """Return the collective that a rank waits in; None after its last."""
        calls, number = self.calls[rank], self.position[rank]
        return calls[number] if number < len(calls) else None

    def complete(self) -> int:
        """Complete what all members wait in, for each rank as far as it gets; return how many collectives that were."""
        count = 0
        for rank in self.calls:
            while (call := self.next_of(rank)) is not None and not self._absent(call):
                for member in self._members(call):
                    self.position[member] += 1
                count += 1
        return count

    def blocked(self) -> Iterator[tuple[bool, int, int]]:
        """Yield each waiting rank with one that it waits for, after whether that one waits in another group or not."""
        for rank in self.calls:
            call = self.next_of(rank)
            if call is not None:
                other = self._absent(call)[0]
                next_call = self.next_of(other)
                yield next_call is None or next_call.group != call.group, rank, other

    def _members(self, call: Call) -> list[int]:
        """Return the rehearsed members of a collective's group."""
        return [rank for rank in call.group if rank in self.calls]

    def _absent(self, call: Call) -> list[int]:
        """Return the members that wait elsewhere."""
        return [rank for rank in self._members(call) if self.next_of(rank) != call]


def messages(ranks: Sequence[RankRehearsal]) -> Iterator[str]:
    """Check that messages match in number, order and sizes at both ends."""
    sent, received = defaultdict(list), defaultdict(list)
    known = {entry.rank for entry in ranks}
    for entry in ranks:
        for call in entry.calls:
            if call.operation == "send" and call.peer in known:
                sent[entry.rank, call.peer].append(call.sizes)
            elif call.operation == "recv_" and call.peer in known:
                received[call.peer, entry.rank].append(call.sizes)
    for ends in sorted(sent.keys() | received.keys()):
        yield from _mismatch(sent[ends], received[ends], *ends)


def _mismatch(sent: list[Any], received: list[Any], source: int, destination: int) -> Iterator[str]:
    for number, (entry, peer_entry) in enumerate(itertools.zip_longest(sent, received)):
        if entry != peer_entry:
            yield (
                f"message {number} from rank {source} to rank {destination}: {_bytes(entry)} are sent, "
                f"{_bytes(peer_entry)} are expected"
            )
            return


def micro_batches(ranks: Sequence[RankRehearsal]) -> Iterator[str]:
    """Check that all replicas have equally many micro-batches in every update; others deadlock Megatron's schedules."""
    numbers = {entry.rank: entry.mini_batches for entry in ranks if entry.mini_batches}
    if len(set(numbers.values())) > 1:
        listed = {rank: sizes if len(sizes) > 1 else sizes[0] for rank, sizes in numbers.items()}
        yield f"ranks have different numbers of micro-batches: {listed}"


def checkpoint(ranks: Sequence[RankRehearsal]) -> Iterator[str]:
    """Check that the parts written by the ranks of one replica cover every tensor exactly once."""
    parts: dict[str, dict[int, list[CheckpointShard]]] = defaultdict(lambda: defaultdict(list))
    for entry in ranks:
        for shard in entry.shards:
            parts[shard.key][entry.rank].append(shard)
    for key, by_rank in parts.items():
        shards = [(rank, shard) for rank, rank_shards in by_rank.items() for shard in rank_shards]
        if len(shapes := {shard.shape for _, shard in shards}) > 1:
            yield f"{key} has different shapes on different ranks: {sorted(shapes)}"
            continue
        written = [(rank, shard) for rank, shard in shards if shard.written]
        for (rank, first), (other, second) in itertools.combinations(written, 2):
            if _overlap(first, second):
                yield f"{key}: ranks {rank} and {other} both write what begins at {first.offset} and {second.offset}"
        count, expected = sum(math.prod(shard.size) for _, shard in written), math.prod(shards[0][1].shape)
        if count < expected:
            writers = sorted({rank for rank, _ in written})
            yield f"{key}: only {count} of its {expected} elements are written, by ranks {writers}"


def _overlap(entry: CheckpointShard, peer_entry: CheckpointShard) -> bool:
    return all(
        start < other + extent and other < start + size
        for start, size, other, extent in zip(entry.offset, entry.size, peer_entry.offset, peer_entry.size, strict=True)
    )


def weight_sync(
    layout: ReshardLayout, ranks: Sequence[RankRehearsal], itemsize: int, batch_bytes: int
) -> Iterator[str]:
    """Check the transfers to the engine among these ranks, and between the first of them and some of its peers.

    Both ends must agree, and every slice must lie in a tensor of the trainer's model or of the engine's layout.
    """
    plans = {entry.rank: planner.plan_transfer(layout, entry.rank, itemsize, batch_bytes) for entry in ranks}
    for entry in ranks:
        yield from _outside(entry, plans[entry.rank], layout)
    first = plans[ranks[0].rank]
    peers = {move.peer for batch in first.batches for move in (*batch.sends, *batch.receives)} - plans.keys()
    spread = sorted(peers)[:: max(len(peers) // PEERS, 1)]
    plans |= {peer: planner.plan_transfer(layout, peer, itemsize, batch_bytes) for peer in spread}
    sends, receives = ({rank: _moves(plan, way) for rank, plan in plans.items()} for way in ("sends", "receives"))
    known = {entry.rank for entry in ranks}
    for source, destination in itertools.permutations(plans, 2):
        if {source, destination} <= known or ranks[0].rank in (source, destination):
            yield from _mismatch(sends[source][destination], receives[destination][source], source, destination)


def _moves(plan: planner.TransferPlan, way: str) -> dict[int, list[tuple[Any, ...]]]:
    """Return (batch, rows, columns) of every slice, by peer."""
    moves: dict[int, list[tuple[Any, ...]]] = defaultdict(list)
    for number, batch in enumerate(plan.batches):
        for move in getattr(batch, way):
            moves[move.peer].append((number, move.rows, move.columns))
    return moves


def _outside(entry: RankRehearsal, plan: planner.TransferPlan, layout: ReshardLayout) -> Iterator[str]:
    """Yield the first slice outside the tensors of the trainer's model and of the engine's layout."""
    engine = vllm_layout.parameter_shapes(layout.arch, layout.engine)
    for batch in plan.batches:
        slices = [(copy.source, copy.rows, copy.columns, entry.shapes) for copy in batch.copies]
        slices += [
            (move.offset, move.rows, move.columns, engine if move.relayed else entry.shapes) for move in batch.sends
        ]
        slices += [(move.offset, move.rows, move.columns, engine) for move in batch.receives]
        for offset, rows, columns, shapes in slices:
            if why := _not_in(offset, rows, columns, shapes):
                yield f"rank {entry.rank}: {why}"
                return


def _not_in(offset: shards.Offset, rows: int, columns: int, shapes: dict[str, tuple[int, ...]]) -> str:
    shape = shapes.get(offset.tensor)
    if shape is None:
        return f"the weight sync reads or writes {offset.tensor}, which is not there"
    if offset.row + rows > shape[0] or offset.column + columns > math.prod(shape[1:]):
        return f"{offset.tensor} has the shape {shape}, and the weight sync accesses row {offset.row + rows} of it"
    return ""


def _members(group: tuple[int, ...] | None) -> str:
    if group is None:
        return "not there"
    return str(list(group)) if len(group) <= 8 else f"[{group[0]}, {group[1]}, ... {group[-1]}] of {len(group)}"


def _describe(call: Call | None) -> str:
    if call is None:
        return "the end"
    how = (*sorted(set(call.dtypes)), f"from root {call.root}" if call.root >= 0 else "")
    return " ".join(filter(None, (call.operation, "of", _bytes(call.sizes), *how, "over", _members(call.group))))


def _bytes(sizes: tuple[int, ...] | None) -> str:
    return "none" if sizes is None else f"{list(sizes)} bytes"

"""What a rehearsal compares, on records written by hand: each fault is found, and nothing else is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import pytest

from oreal_megatron.plan import matching


class Call(NamedTuple):
    operation: str
    group: tuple[int, ...]
    sizes: tuple[int, ...] = (8,)
    peer: int = -1
    dtypes: tuple[str, ...] = ("torch.float32",)
    root: int = -1


class CheckpointShard(NamedTuple):
    key: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]
    written: bool = True


def rank(number: int, *calls: Call, groups: list = (), shards: list = (), tokens: tuple = ()):
    sizes = (len(tokens),) if tokens else ()
    names = dict(groups=groups, shards=shards, tokens=tokens, mini_batches=sizes)
    return SimpleNamespace(rank=number, calls=list(calls), **names)


TP0, TP1, DP0, DP1 = (Call("allreduce_", ranks) for ranks in ((0, 1), (2, 3), (0, 2), (1, 3)))


def test_collectives_that_meet_are_sound_however_they_interleave():
    ranks = [rank(0, TP0, DP0), rank(1, TP0, DP1, TP0._replace(group=(1,))), rank(2, TP1, DP0), rank(3, TP1, DP1)]
    assert list(matching.collectives(ranks)) == []


@pytest.mark.parametrize(
    ("second", "says"),
    [
        ([DP0, TP0], "which is at its 0"),  # each waits in one group for the other, both have the same calls
        ([TP0], "which is at its 1, the end"),
        ([TP0._replace(sizes=(16,)), DP0], "allreduce_ of [16] bytes"),
        ([TP0._replace(operation="broadcast_"), DP0], "broadcast_"),
        ([TP0._replace(root=1), DP0], "from root 1"),
        ([TP0._replace(dtypes=("torch.int64",)), DP0], "torch.int64"),
    ],
)
def test_ranks_that_would_wait_for_ever_are_named(second, says):
    pair = [call._replace(group=(0, 1) if call.group == (0, 1) else (1, 0)) for call in second]
    faults = list(matching.collectives([rank(0, TP0, Call("allreduce_", (1, 0))), rank(1, *pair)]))
    assert faults and "waits in its collective" in faults[0]
    assert says in " ".join(faults)


def test_who_disagrees_is_named_before_who_waits_for_them():
    world = Call("allreduce_", (0, 1, 2))
    ranks = [
        rank(0, world),
        rank(1, Call("allreduce_", (1, 2), (4,)), world),
        rank(2, Call("allreduce_", (1, 2)), world),
    ]
    assert [fault.split(" waits")[0] for fault in matching.collectives(ranks)] == ["rank 1", "rank 2", "rank 0"]


def test_members_that_were_not_rehearsed_are_taken_to_come():
    assert list(matching.collectives([rank(0, Call("allreduce_", (0, 5, 6)))])) == []


def test_messages_must_be_waited_for_as_they_are_sent():
    def send(size, to):
        return Call("send", (0, 1), (size,), to)

    def receive(size, source):
        return Call("recv_", (0, 1), (size,), source)

    sound = [rank(0, send(8, 1), send(4, 1), receive(2, 1)), rank(1, receive(8, 0), send(2, 0), receive(4, 0))]
    assert list(matching.messages(sound)) == []
    swapped = [sound[0], rank(1, receive(4, 0), send(2, 0), receive(8, 0))]
    assert list(matching.messages(swapped)) == [
        "message 0 from rank 0 to rank 1: [8] bytes are sent, [4] bytes are expected"
    ]
    assert "none are expected" in next(matching.messages([sound[0], rank(1, receive(8, 0), send(2, 0))]))
    assert list(matching.messages([rank(0, send(8, 7))])) == [], "rank 7 was not rehearsed"


def test_groups_must_be_made_alike():
    assert list(matching.groups([rank(0, groups=[(0, 1), (2, 3)]), rank(1, groups=[(0, 1), (2, 3)])])) == []
    assert "process group 1 is [2, 3] on rank 0, and [1, 3]" in next(
        matching.groups([rank(0, groups=[(0, 1), (2, 3)]), rank(1, groups=[(0, 1), (1, 3)])])
    )
    assert "not there on rank 1" in next(matching.groups([rank(0, groups=[(0, 1)]), rank(1, groups=[])]))


def test_a_checkpoint_holds_every_element_once():
    top, bottom = CheckpointShard("w", (4, 2), (0, 0), (2, 2)), CheckpointShard("w", (4, 2), (2, 0), (2, 2))
    copy = top._replace(written=False)
    assert list(matching.checkpoint([rank(0, shards=[top]), rank(1, shards=[bottom]), rank(2, shards=[copy])])) == []
    assert "only 4 of its 8 elements" in next(matching.checkpoint([rank(0, shards=[top]), rank(2, shards=[copy])]))
    over = bottom._replace(offset=(1, 0))
    assert "ranks 0 and 1 both write" in next(matching.checkpoint([rank(0, shards=[top]), rank(1, shards=[over])]))
    other = bottom._replace(shape=(4, 3))
    assert "different shapes" in next(matching.checkpoint([rank(0, shards=[top]), rank(1, shards=[other])]))


def test_numbers_of_micro_batches_must_agree():
    assert list(matching.micro_batches([rank(0, tokens=(5, 6)), rank(1, tokens=(9, 1)), rank(2)])) == []
    assert "{0: 2, 1: 1}" in next(matching.micro_batches([rank(0, tokens=(5, 6)), rank(1, tokens=(9,))]))

"""The direct transport: slices travel from rank to rank and are written into the engine's live parameters.

One message for each peer and batch, packed in a buffer. Two batches are under way at once, each with a buffer for what
is sent and one for what is received; a batch's buffers are used again only after all of it has arrived.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor

from oreal_megatron.reshard.byte_counter import ByteCounter
from oreal_megatron.reshard.planner import Move, TransferBatch, TransferPlan
from oreal_megatron.reshard.shards import Offset, cut, matrix

BUFFERS = 4  # two batches under way, each sends and receives


@dataclass(frozen=True)
class Message:
    """What goes to, or comes from, one peer in one batch: views of this rank's tensors, in the peer's order."""

    peer: int
    parts: list[Tensor]
    elements: int


@dataclass(frozen=True)
class Step:
    """A batch whose slices have become views."""

    sends: list[Message]
    receives: list[Message]
    sources: list[Tensor]
    targets: list[Tensor]  # of the slices that stay on this rank


class Direct:
    """The transfers of a plan, with the tensors of both sides of this rank.

    `held` are the trainer's tensors by Megatron's names, `live` the engine's parameters by vLLM's; both stay where they
    are as long as this object is used, which `moved` tells.
    """

    def __init__(self, plan: TransferPlan, held: dict[str, Tensor], live: dict[str, Tensor]):
        self.addresses = _addresses(held, live)
        ours, theirs = ({name: matrix(x) for name, x in side.items()} for side in (held, live))
        engine = next(iter(theirs.values()))
        self.dtype, self.device = engine.dtype, engine.device
        self.steps = [_step(batch, ours, theirs) for batch in plan.batches]

    def moved(self, held: dict[str, Tensor], live: dict[str, Tensor]) -> bool:
        """Whether a tensor lies elsewhere than when the views were made."""
        return self.addresses != _addresses(held, live)

    @torch.no_grad()
    def run(self, counted: ByteCounter) -> None:
        """Carry out all transfers and count what travels. Collective."""
        under_way, buffers = deque(), self.buffers()
        for number, step in enumerate(self.steps):
            if len(under_way) == 2:
                self.arrive(*under_way.popleft())
            sending, receiving = buffers[number % 2]
            under_way.append((step, receiving, self.post(step, sending, receiving, counted)))
        while under_way:
            self.arrive(*under_way.popleft())

    def buffers(self) -> list[tuple[Tensor, Tensor]]:
        """For even and for odd batches: what is sent, what is received. Freed after every run."""
        sizes = [
            max((sum(message.elements for message in getattr(step, way)) for step in self.steps), default=0)
            for way in ("sends", "receives")
        ]
        return [tuple(torch.empty(size, dtype=self.dtype, device=self.device) for size in sizes) for _ in range(2)]

    def post(self, step: Step, sending: Tensor, receiving: Tensor, counted: ByteCounter) -> list[dist.Work]:
        """Copy what stays, pack what leaves, and start the messages."""
        if step.sources:
            torch._foreach_copy_(step.targets, step.sources)
        operations = []
        for message, buffer in _parcels(step.sends, sending):
            torch._foreach_copy_(_views(buffer, message.parts), message.parts)
            operations.append(dist.P2POp(dist.isend, buffer, message.peer))
            counted.add("sent", message.peer, buffer)
        for message, buffer in _parcels(step.receives, receiving):
            operations.append(dist.P2POp(dist.irecv, buffer, message.peer))
            counted.add("received", message.peer, buffer)
        return dist.batch_isend_irecv(operations) if operations else []

    def arrive(self, step: Step, receiving: Tensor, works: list[dist.Work]) -> None:
        """Wait for a batch and write what came into the engine's parameters."""
        for work in works:
            work.wait()
        for message, buffer in _parcels(step.receives, receiving):
            torch._foreach_copy_(message.parts, _views(buffer, message.parts))


def _addresses(held: dict[str, Tensor], live: dict[str, Tensor]) -> list[int]:
    return [tensor.data_ptr() for side in (held, live) for tensor in side.values()]


def _step(batch: TransferBatch, held: dict[str, Tensor], live: dict[str, Tensor]) -> Step:
    def view(side: dict[str, Tensor], spot: Offset, rows: int, columns: int) -> Tensor:
        return cut(side[spot.tensor], spot, rows, columns)

    def messages(moves: list[Move], side: dict[str, Tensor]) -> list[Message]:
        found = []
        for peer, same in groupby(sorted(moves, key=lambda move: move.peer), key=lambda move: move.peer):
            parts = [view(live if move.relayed else side, move.spot, move.rows, move.columns) for move in same]
            found.append(Message(peer, parts, sum(part.numel() for part in parts)))
        return found

    sources = [view(held, copy.source, copy.rows, copy.columns) for copy in batch.copies]
    targets = [view(live, copy.target, copy.rows, copy.columns) for copy in batch.copies]
    return Step(messages(batch.sends, held), messages(batch.receives, live), sources, targets)


def _parcels(messages: list[Message], buffer: Tensor) -> list[tuple[Message, Tensor]]:
    """Each message with its own part of the buffer."""
    parts = buffer[: sum(message.elements for message in messages)].split([message.elements for message in messages])
    return list(zip(messages, parts, strict=True))


def _views(buffer: Tensor, parts: list[Tensor]) -> list[Tensor]:
    """The buffer cut into the shapes of the parts."""
    flat = buffer.split([part.numel() for part in parts])
    return [piece.view(part.shape) for piece, part in zip(flat, parts, strict=True)]

"""Direct transport: overlaps travel from rank to rank and are written into the engine's live parameters.

Each batch has one message per peer, packed in a buffer. Two batches are in flight at once, each with a buffer to send
and one to receive; the buffers of a batch are reused only after all of it has arrived.
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
from oreal_megatron.reshard.shards import Offset, as_matrix, submatrix


@dataclass(frozen=True)
class Message:
    """A message to or from one peer in one batch: views of this rank's tensors, in the peer's order."""

    peer: int
    views: list[Tensor]
    elements: int


@dataclass(frozen=True)
class BatchViews:
    """A batch of the plan with views of this rank's tensors."""

    sends: list[Message]
    receives: list[Message]
    sources: list[Tensor]
    targets: list[Tensor]  # of overlaps that stay on this rank


class DirectTransfer:
    """A transfer plan with this rank's tensors of both sides.

    `trainer_tensors` have Megatron's names, `parameters` (of the engine) vLLM's. The views that this object holds are
    valid as long as no tensor moves; `is_stale` checks that.
    """

    def __init__(self, plan: TransferPlan, trainer_tensors: dict[str, Tensor], parameters: dict[str, Tensor]):
        self.addresses = _addresses(trainer_tensors, parameters)
        sources = {name: as_matrix(tensor) for name, tensor in trainer_tensors.items()}
        targets = {name: as_matrix(tensor) for name, tensor in parameters.items()}
        first = next(iter(targets.values()))
        self.dtype, self.device = first.dtype, first.device
        self.batches = [_batch_views(batch, sources, targets) for batch in plan.batches]

    def is_stale(self, trainer_tensors: dict[str, Tensor], parameters: dict[str, Tensor]) -> bool:
        """Check whether a tensor has moved in memory since the views were made."""
        return self.addresses != _addresses(trainer_tensors, parameters)

    @torch.no_grad()
    def run(self, counter: ByteCounter) -> None:
        """Carry out all transfers and count the bytes. Collective."""
        in_flight: deque[tuple[BatchViews, Tensor, list[dist.Work]]] = deque()
        buffers = self.allocate_buffers()
        for number, batch in enumerate(self.batches):
            if len(in_flight) == 2:
                self.finish_batch(*in_flight.popleft())
            sending, receiving = buffers[number % 2]
            in_flight.append((batch, receiving, self.start_batch(batch, sending, receiving, counter)))
        while in_flight:
            self.finish_batch(*in_flight.popleft())

    def allocate_buffers(self) -> list[tuple[Tensor, Tensor]]:
        """Return (send, receive) buffers for even and for odd batches; they are freed after every run."""
        send = max((_elements(batch.sends) for batch in self.batches), default=0)
        receive = max((_elements(batch.receives) for batch in self.batches), default=0)

        def empty(size: int) -> Tensor:
            return torch.empty(size, dtype=self.dtype, device=self.device)

        return [(empty(send), empty(receive)) for _ in range(2)]

    def start_batch(
        self, batch: BatchViews, sending: Tensor, receiving: Tensor, counter: ByteCounter
    ) -> list[dist.Work]:
        """Copy the overlaps that stay, pack those that leave, and start the messages."""
        if batch.sources:
            torch._foreach_copy_(batch.targets, batch.sources)
        operations = []
        for message, buffer in _with_buffers(batch.sends, sending):
            torch._foreach_copy_(_unpacked(buffer, message.views), message.views)
            operations.append(dist.P2POp(dist.isend, buffer, message.peer))
            counter.add("sent", message.peer, buffer)
        for message, buffer in _with_buffers(batch.receives, receiving):
            operations.append(dist.P2POp(dist.irecv, buffer, message.peer))
            counter.add("received", message.peer, buffer)
        return dist.batch_isend_irecv(operations) if operations else []

    def finish_batch(self, batch: BatchViews, receiving: Tensor, works: list[dist.Work]) -> None:
        """Wait for a batch and write the received overlaps into the engine's parameters."""
        for work in works:
            work.wait()
        for message, buffer in _with_buffers(batch.receives, receiving):
            torch._foreach_copy_(message.views, _unpacked(buffer, message.views))


def _addresses(trainer_tensors: dict[str, Tensor], parameters: dict[str, Tensor]) -> list[int]:
    return [tensor.data_ptr() for side in (trainer_tensors, parameters) for tensor in side.values()]


def _batch_views(batch: TransferBatch, trainer_tensors: dict[str, Tensor], parameters: dict[str, Tensor]) -> BatchViews:
    def view(side: dict[str, Tensor], offset: Offset, rows: int, columns: int) -> Tensor:
        return submatrix(side[offset.tensor], offset, rows, columns)

    def messages(moves: list[Move], side: dict[str, Tensor]) -> list[Message]:
        result = []
        for peer, group in groupby(sorted(moves, key=lambda move: move.peer), key=lambda move: move.peer):
            views = [view(parameters if move.relayed else side, *move[1:4]) for move in group]
            result.append(Message(peer, views, sum(part.numel() for part in views)))
        return result

    sources = [view(trainer_tensors, copy.source, copy.rows, copy.columns) for copy in batch.copies]
    targets = [view(parameters, copy.target, copy.rows, copy.columns) for copy in batch.copies]
    return BatchViews(messages(batch.sends, trainer_tensors), messages(batch.receives, parameters), sources, targets)


def _elements(messages: list[Message]) -> int:
    return sum(message.elements for message in messages)


def _with_buffers(messages: list[Message], buffer: Tensor) -> list[tuple[Message, Tensor]]:
    """Give each message its own part of the buffer."""
    parts = buffer[: _elements(messages)].split([message.elements for message in messages])
    return list(zip(messages, parts, strict=True))


def _unpacked(buffer: Tensor, views: list[Tensor]) -> list[Tensor]:
    """Split the buffer into the shapes of the views."""
    parts = buffer.split([view.numel() for view in views])
    return [part.view(view.shape) for part, view in zip(parts, views, strict=True)]

"""Bytes that this rank sends and receives, counted on the tensors that torch.distributed is given."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor


@dataclass
class ByteCounter:
    """Bytes sent and received, and those of them that cross between nodes of `node` ranks.

    A collective is counted by whose bytes they are: from their owner to every other rank of the group. On the way a
    backend may pass them on through others; what a rank receives in all is the same.
    """

    node: int
    sent: int = 0
    received: int = 0
    sent_between: int = 0
    received_between: int = 0

    def add(self, way: str, peer: int, tensor: Tensor) -> None:
        """A tensor that was "sent" to, or "received" from, a peer."""
        near = peer // self.node == dist.get_rank() // self.node
        for name in (way,) if near else (way, f"{way}_between"):
            setattr(self, name, getattr(self, name) + tensor.nbytes)

    def all_gather(self, tensor: Tensor, group: dist.ProcessGroup) -> None:
        """`tensor` was this rank's part."""
        for peer in _others(group):
            self.add("sent", peer, tensor)
            self.add("received", peer, tensor)

    def broadcast(self, tensor: Tensor, source: int, group: dist.ProcessGroup) -> None:
        """`source` is a rank of the world."""
        if source != dist.get_rank():
            self.add("received", source, tensor)
            return
        for peer in _others(group):
            self.add("sent", peer, tensor)


def _others(group: dist.ProcessGroup) -> list[int]:
    return [rank for rank in dist.get_process_group_ranks(group) if rank != dist.get_rank()]

"""Bytes that this rank sends and receives, counted on the tensors given to torch.distributed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.distributed as dist
from torch import Tensor


@dataclass
class ByteCounter:
    """Bytes sent and received, in total and between nodes of `node_size` ranks.

    A collective counts as a message from the owner of each tensor to every other rank of the group. A backend may
    forward messages through other ranks; the total that a rank receives is the same.
    """

    node_size: int
    sent: int = 0
    received: int = 0
    sent_between: int = 0  # to ranks of other nodes
    received_between: int = 0  # from ranks of other nodes

    def add(self, direction: Literal["sent", "received"], peer: int, tensor: Tensor) -> None:
        """Count one tensor sent to, or received from, a peer."""
        same_node = peer // self.node_size == dist.get_rank() // self.node_size
        for name in (direction,) if same_node else (direction, f"{direction}_between"):
            setattr(self, name, getattr(self, name) + tensor.nbytes)

    def all_gather(self, tensor: Tensor, group: dist.ProcessGroup) -> None:
        """Count an all-gather; `tensor` is this rank's part."""
        for peer in _other_ranks(group):
            self.add("sent", peer, tensor)
            self.add("received", peer, tensor)

    def broadcast(self, tensor: Tensor, source: int, group: dist.ProcessGroup) -> None:
        """Count a broadcast from the global rank `source`."""
        if source != dist.get_rank():
            self.add("received", source, tensor)
            return
        for peer in _other_ranks(group):
            self.add("sent", peer, tensor)


def _other_ranks(group: dist.ProcessGroup) -> list[int]:
    return [rank for rank in dist.get_process_group_ranks(group) if rank != dist.get_rank()]

"""Small torch.distributed helpers that work without a process group as well (one process)."""

from __future__ import annotations

import os
from typing import Any

import torch.distributed as dist

_ON_THIS_MACHINE = os.environ.get("LOCAL_WORLD_SIZE")  # torchrun's; vLLM's CPU platform puts its own number there later


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def node_size() -> int:
    """Ranks on this machine; torchrun starts as many on each."""
    return int(_ON_THIS_MACHINE or world_size())


def all_gather_object(value: Any) -> list[Any]:
    """The value of every rank, on every rank, in rank order."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values

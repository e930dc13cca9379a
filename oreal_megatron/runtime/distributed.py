"""torch.distributed helpers that also work in one process without a process group."""

from __future__ import annotations

import os
from typing import Any

import torch.distributed as dist

_LOCAL_WORLD_SIZE = os.environ.get("LOCAL_WORLD_SIZE")  # read early: vLLM's CPU platform overwrites it


def rank() -> int:
    """Return this process's rank in the job; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Return the number of processes of the job; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def node_size() -> int:
    """Return the ranks on this node; torchrun starts as many on every node."""
    return int(_LOCAL_WORLD_SIZE or world_size())


def all_gather_object(value: Any) -> list[Any]:
    """Return the picklable values of all ranks, in rank order, on every rank. Collective."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def gather_object(value: Any) -> list[Any]:
    """Return the picklable values of all ranks, in rank order, on the first rank; [] on the others. Collective."""
    if world_size() == 1:
        return [value]
    values: list[Any] | None = [None] * world_size() if rank() == 0 else None
    dist.gather_object(value, values)
    return values or []

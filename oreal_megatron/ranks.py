"""Small torch.distributed helpers that work without a process group as well (one process)."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def gather(value: Any) -> list[Any]:
    """The value of every rank, on every rank, in rank order."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def total(values: dict[str, float], operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> dict[str, float]:
    """Key by key over all ranks, in float64; every rank passes the same keys."""
    if world_size() == 1:
        return dict(values)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    numbers = torch.tensor([float(value) for value in values.values()], dtype=torch.float64, device=device)
    dist.all_reduce(numbers, operation)
    return dict(zip(values, numbers.tolist(), strict=True))

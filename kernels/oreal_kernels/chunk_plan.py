"""Choice of the chunk size of a head and of the chunks saved for the backward, by a cost model without measurement.

One product of N x H x V costs 2NHV operations. Forward and backward need three; logits that were not saved cost a
fourth. Every chunk reads and writes the fp32 weight gradient once, so small chunks cost memory traffic. Waves of tiles
are not in the model: an H200 multiplies 3520 rows, 4.2 waves of the hidden states' gradient, as fast as 4160, 5.0 waves
(docs/how_to/gpu.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

MAX_ROWS = 8192  # rows of a chunk; larger chunks gain nothing
STEP_ROWS = 64  # at most, between two sizes that are compared
MODES = ("auto", "save", "recompute")


@dataclass(frozen=True, slots=True)
class DeviceSpeed:
    """Peak speeds of a device, as far as the cost model needs them."""

    flops: float  # operations per second of bf16 matrix products
    bytes_per_second: float  # memory bandwidth


GPU = DeviceSpeed(790e12, 4.3e12)  # an H200; only the ratio matters, which is similar from A100 to B200
CPU = DeviceSpeed(0.35e12, 10e9)  # per core


class ChunkPlan(NamedTuple):
    """Rows of a chunk, and the number of chunks whose logits are saved."""

    chunk_rows: int
    saved_chunks: int  # the first ones; the backward recomputes the others


def device_speed(device: torch.device) -> DeviceSpeed:
    """Return the speeds assumed for a device."""
    return GPU if device.type == "cuda" else CPU


@lru_cache(maxsize=256)
def choose(
    rows: int, hidden: int, vocabulary: int, row_bytes: int, budget: int, mode: str, speed: DeviceSpeed
) -> ChunkPlan:
    """Return the fastest plan whose logits fit into `budget` bytes (one row is always allowed).

    "auto" saves the logits of all chunks, some or none, as the budget allows; "save" saves all, whatever the budget;
    "recompute" saves none. Raises ValueError for another mode.
    """
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; expected one of {', '.join(MODES)}")
    if rows == 0:
        return ChunkPlan(1, 0)
    fitting_rows = max(1, rows if mode == "save" else budget // row_bytes)
    if fitting_rows >= rows and mode != "recompute":
        return ChunkPlan(rows, 1)
    largest = min(fitting_rows, rows, MAX_ROWS)
    step = max(min(STEP_ROWS, largest // 16), 1)
    sizes = [largest, *range((largest - 1) // step * step, 0, -step)]
    plans = [ChunkPlan(size, 0 if mode == "recompute" else fitting_rows // size - 1) for size in sizes]
    return min(plans, key=lambda plan: modelled_seconds(plan, rows, hidden, vocabulary, speed))


def modelled_seconds(plan: ChunkPlan, rows: int, hidden: int, vocabulary: int, speed: DeviceSpeed) -> float:
    """Return the modelled time of forward and backward, without the passes between the products."""
    recomputed = max(0, rows - plan.chunk_rows * plan.saved_chunks)
    products = 2 * hidden * vocabulary * (3 * rows + recomputed) / speed.flops
    weight_gradient = 8 * hidden * vocabulary * math.ceil(rows / plan.chunk_rows) / speed.bytes_per_second
    return products + weight_gradient

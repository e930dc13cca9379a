"""Choice of the chunk size of a head and of the chunks saved for the backward, by a cost model without measurement.

A chunk of n rows takes three products, each of 2nHV operations: logits [n, V], the hidden states' gradient [n, H] and
the weight's gradient [V, H]. Logits that were not saved cost a fourth. Every chunk reads and writes the fp32 weight
gradient once, so small chunks cost memory traffic. A GPU computes a result in tiles, one wave of a tile per
multiprocessor after the other, and a last wave that is not full takes as long as a full one: the gradient of the hidden
states has few tiles, so that some chunk sizes waste a sixth of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

MAX_ROWS = 8192  # rows of a chunk; larger chunks gain nothing
STEP_ROWS = 64  # at most, between two sizes that are compared
TILE = (128, 256)  # rows and columns of a product's result that one multiprocessor computes at a time
MODES = ("auto", "save", "recompute")


@dataclass(frozen=True, slots=True)
class DeviceSpeed:
    """Peak speeds of a device, as far as the cost model needs them."""

    flops: float  # operations per second of bf16 matrix products
    bytes_per_second: float  # memory bandwidth
    multiprocessors: int = 1


# An H200; of the speeds only the ratio matters, which is similar from A100 to B200. Not asked of the device: all ranks
# of a tensor-parallel group must choose the same plan.
GPU = DeviceSpeed(790e12, 4.3e12, multiprocessors=132)
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
    full, remainder = divmod(rows, plan.chunk_rows)
    recomputed = max(full - plan.saved_chunks, 0)
    seconds = full * _chunk_seconds(plan.chunk_rows, hidden, vocabulary, speed)
    seconds += recomputed * _product_seconds(plan.chunk_rows, vocabulary, hidden, speed)
    if remainder:
        seconds += _chunk_seconds(remainder, hidden, vocabulary, speed)
        if full >= plan.saved_chunks:
            seconds += _product_seconds(remainder, vocabulary, hidden, speed)
    return seconds


def _chunk_seconds(rows: int, hidden: int, vocabulary: int, speed: DeviceSpeed) -> float:
    """Return the time of a chunk's three products, and of the weight gradient's memory traffic."""
    logits = _product_seconds(rows, vocabulary, hidden, speed)
    hidden_gradient = _product_seconds(rows, hidden, vocabulary, speed)
    weight_gradient = _product_seconds(vocabulary, hidden, rows, speed)
    return logits + hidden_gradient + weight_gradient + 8 * hidden * vocabulary / speed.bytes_per_second


def _product_seconds(rows: int, columns: int, depth: int, speed: DeviceSpeed) -> float:
    """Return the time of a product with a result [rows, columns]; on one processor all tiles are one wave."""
    if speed.multiprocessors == 1:
        return 2 * rows * columns * depth / speed.flops
    tiles = math.ceil(rows / TILE[0]) * math.ceil(columns / TILE[1])
    waves = math.ceil(tiles / speed.multiprocessors)
    return waves * speed.multiprocessors * 2 * math.prod(TILE) * depth / speed.flops

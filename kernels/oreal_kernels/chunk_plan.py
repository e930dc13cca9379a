"""How many rows of logits exist at a time, and how many are kept for the backward: a cost model, no measurement.

One product of N x H x V costs 2NHV operations. Forward and backward need three; logits that were not kept cost a
fourth. Every chunk reads and writes the fp32 weight gradient once, so small chunks cost memory traffic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

MOST_ROWS = 8192  # of a chunk: larger ones gain nothing
MODES = ("auto", "save", "recompute")


@dataclass(frozen=True, slots=True)
class Machine:
    flops: float  # of bf16 products, per second
    bytes_per_second: float  # of memory


GPU = Machine(790e12, 4.3e12)  # an H200; only the ratio matters, and it is alike on A100 to B200
CPU = Machine(0.35e12, 10e9)  # per core


class Plan(NamedTuple):
    chunk_rows: int
    kept_chunks: int  # the first ones; the others are computed again in the backward


def machine(device: torch.device) -> Machine:
    return GPU if device.type == "cuda" else CPU


def choose(rows: int, hidden: int, vocabulary: int, row_bytes: int, budget: int, mode: str, on: Machine) -> Plan:
    """The fastest plan whose logits fit into `budget` bytes (one row always does).

    "auto" keeps all of them, some (a hybrid) or none, as the budget allows; "save" keeps all, whatever the budget;
    "recompute" keeps none.
    """
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; wanted one of {', '.join(MODES)}")
    if rows == 0:
        return Plan(1, 0)
    fitting = max(1, rows if mode == "save" else budget // row_bytes)
    if fitting >= rows and mode != "recompute":
        return Plan(rows, 1)
    plans = []
    for parts in (1, 2, 3, 4, 6, 8, 12, 16):  # one is worked on; the others are kept, or not used
        size = min(max(1, fitting // parts), rows, MOST_ROWS)
        size = size // 64 * 64 or size  # whole tiles of the products
        plans.append(Plan(size, 0 if mode == "recompute" else fitting // size - 1))
    return min(plans, key=lambda plan: seconds(plan, rows, hidden, vocabulary, on))


def seconds(plan: Plan, rows: int, hidden: int, vocabulary: int, on: Machine) -> float:
    """Modelled time of forward and backward, without what lies between the products."""
    recomputed = max(0, rows - plan.chunk_rows * plan.kept_chunks)
    products = 2 * hidden * vocabulary * (3 * rows + recomputed) / on.flops
    weight_gradient = 8 * hidden * vocabulary * math.ceil(rows / plan.chunk_rows) / on.bytes_per_second
    return products + weight_gradient

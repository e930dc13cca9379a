"""Statistics of several parts of the vocabulary -> those of the whole, log-prob, normaliser and entropy."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from oreal_kernels import backend, triton_launch


class Combined(NamedTuple):
    statistics: Tensor  # [4, N] of the whole vocabulary
    logp: Tensor  # [N] of the label, nats
    log_total: Tensor  # [N] log-sum-exp less the maximum, next to which it would lose digits
    entropy: Tensor  # [N] nats


def reference(parts: Tensor) -> Combined:
    """[P, 4, N] -> Combined. A part without columns has maximum -inf and adds nothing."""
    maxima, sums, spreads, targets = parts.unbind(1)
    maximum = maxima.amax(0)
    moved = torch.where(maxima == -torch.inf, 0, maxima - maximum)
    fade = torch.where(maxima == -torch.inf, 0, torch.exp(moved))
    total, target = (sums * fade).sum(0), targets.sum(0)
    spread = (fade * (spreads + sums * moved)).sum(0)
    log_total = torch.log(total)
    return Combined(
        torch.stack([maximum, total, spread, target]),
        target - maximum - log_total,
        log_total,
        log_total - spread / total,
    )


@triton.jit(do_not_specialize=["rows"])
def combine_kernel(parts, out, rows, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    maximum = tl.full((BLOCK,), float("-inf"), tl.float32)
    for part in range(PARTS):
        maximum = tl.maximum(maximum, tl.load(parts + part * 4 * rows + row, mask=inside, other=0.0))
    total = tl.zeros((BLOCK,), tl.float32)
    spread = tl.zeros((BLOCK,), tl.float32)
    target = tl.zeros((BLOCK,), tl.float32)
    for part in range(PARTS):  # in rank order: bitwise the same on every rank
        place = parts + part * 4 * rows + row
        own = tl.load(place, mask=inside, other=0.0)
        some = tl.load(place + rows, mask=inside, other=1.0)
        moved = tl.where(own == float("-inf"), 0.0, own - maximum)
        fade = tl.where(own == float("-inf"), 0.0, tl.exp(moved))
        total += some * fade
        spread += fade * (tl.load(place + 2 * rows, mask=inside, other=0.0) + some * moved)
        target += tl.load(place + 3 * rows, mask=inside, other=0.0)
    log_total = tl.log(total)
    place = out + row
    tl.store(place, maximum, mask=inside)
    tl.store(place + rows, total, mask=inside)
    tl.store(place + 2 * rows, spread, mask=inside)
    tl.store(place + 3 * rows, target, mask=inside)
    tl.store(place + 4 * rows, target - maximum - log_total, mask=inside)
    tl.store(place + 5 * rows, log_total, mask=inside)
    tl.store(place + 6 * rows, log_total - spread / total, mask=inside)


def combine(parts: Tensor) -> Combined:
    """As `reference`, by the backend of the device; parts in rank order, so that all ranks get the same bits."""
    rows = parts.shape[2]
    if backend.choose(parts) != "triton" or not rows:
        return reference(parts)
    out = torch.empty(7, rows, dtype=torch.float32, device=parts.device)
    options = triton_launch.options("combine", parts.device)
    combine_kernel[(triton.cdiv(rows, options["BLOCK"]),)](parts, out, rows, PARTS=len(parts), **options)
    return Combined(out[:4], *out[4:])

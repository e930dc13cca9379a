"""Merge of the statistics of several parts of the vocabulary, with log-prob, normaliser and entropy."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from oreal_kernels import backend, triton_launch


class Combined(NamedTuple):
    """Statistics of the full vocabulary and what follows from them."""

    statistics: Tensor  # [4, N]
    logp: Tensor  # [N] of the label, nats
    log_total: Tensor  # [N] log-sum-exp minus the maximum, apart because their sum would lose digits
    entropy: Tensor  # [N] nats


def reference(parts: Tensor) -> Combined:
    """Merge [parts, 4, N] in plain torch. A part without columns has maximum -inf and adds nothing."""
    maxima, sums, spreads, targets = parts.unbind(1)
    maximum = maxima.amax(0)
    shift = torch.where(maxima == -torch.inf, 0, maxima - maximum)
    fade = torch.where(maxima == -torch.inf, 0, torch.exp(shift))
    total, target = (sums * fade).sum(0), targets.sum(0)
    spread = (fade * (spreads + sums * shift)).sum(0)
    log_total = torch.log(total)
    return Combined(
        torch.stack([maximum, total, spread, target]),
        target - maximum - log_total,
        log_total,
        log_total - spread / total,
    )


@triton.jit(do_not_specialize=["rows"])
def combine_kernel(parts, out, rows, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Merge the parts of BLOCK rows per program; `out` is [7, N]."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    maximum = tl.full((BLOCK,), float("-inf"), tl.float32)
    for part in range(PARTS):
        maximum = tl.maximum(maximum, tl.load(parts + part * 4 * rows + row, mask=inside, other=0.0))
    total = tl.zeros((BLOCK,), tl.float32)
    spread = tl.zeros((BLOCK,), tl.float32)
    target = tl.zeros((BLOCK,), tl.float32)
    for part in range(PARTS):  # in rank order, so that every rank gets the same bits
        source = parts + part * 4 * rows + row
        part_maximum = tl.load(source, mask=inside, other=0.0)
        part_total = tl.load(source + rows, mask=inside, other=1.0)
        shift = tl.where(part_maximum == float("-inf"), 0.0, part_maximum - maximum)
        fade = tl.where(part_maximum == float("-inf"), 0.0, tl.exp(shift))
        total += part_total * fade
        spread += fade * (tl.load(source + 2 * rows, mask=inside, other=0.0) + part_total * shift)
        target += tl.load(source + 3 * rows, mask=inside, other=0.0)
    log_total = tl.log(total)
    target_row = out + row
    tl.store(target_row, maximum, mask=inside)
    tl.store(target_row + rows, total, mask=inside)
    tl.store(target_row + 2 * rows, spread, mask=inside)
    tl.store(target_row + 3 * rows, target, mask=inside)
    tl.store(target_row + 4 * rows, target - maximum - log_total, mask=inside)
    tl.store(target_row + 5 * rows, log_total, mask=inside)
    tl.store(target_row + 6 * rows, log_total - spread / total, mask=inside)


def combine(parts: Tensor) -> Combined:
    """Merge [parts, 4, N] fp32 by the backend of the device, in rank order: all ranks get the same bits."""
    rows = parts.shape[2]
    if backend.choose(parts) != "triton" or not rows:
        return reference(parts)
    out = torch.empty(7, rows, dtype=torch.float32, device=parts.device)
    options = triton_launch.options("combine", parts.device)
    combine_kernel[(triton.cdiv(rows, options["BLOCK"]),)](parts, out, rows, PARTS=len(parts), **options)
    return Combined(out[:4], *out[4:])

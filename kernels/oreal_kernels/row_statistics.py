"""One pass over the logits of each row: [4, N] statistics from which log-prob and entropy follow.

The vocabulary may be split over tensor-parallel ranks: `combine` merges their statistics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from oreal_kernels import backend, native, triton_launch
from oreal_kernels.combine import combine
from oreal_kernels.softcap import exp_kernel, scaled, scaled_kernel


def reference(
    logits: Tensor,  # [N, V'] of one rank, padding included
    label_column: Tensor,  # [N] int64; outside [0, columns): another rank holds the label, or the row is ignored
    inverse_temperature: Tensor,  # [N] fp32
    softcap: float,  # 0: none
    columns: int,  # columns of the vocabulary; further columns are padding
) -> Tensor:
    """Return [4, N] statistics of z = softcap tanh(logit / softcap) / temperature, in plain torch.

    They are the maximum m, sum of exp(z - m), sum of exp(z - m)(z - m), and z of the label (0 where another rank holds
    it). Without columns: -inf, 0, 0, 0.
    """
    z, _ = scaled(logits[:, :columns], inverse_temperature, softcap)
    if not columns:
        return torch.cat([z.new_full((1, len(z)), -torch.inf), z.new_zeros(3, len(z))])
    maximum = z.amax(1)
    below = z - torch.where(maximum == -torch.inf, 0, maximum)[:, None]
    weight = torch.exp(below)
    spread = torch.where(weight > 0, weight * below, 0)
    local = (label_column >= 0) & (label_column < columns)
    target = z.gather(1, label_column.clamp(0, columns - 1)[:, None])[:, 0]
    return torch.stack([maximum, weight.sum(1), spread.sum(1), torch.where(local, target, 0)])


@triton.jit
def online(z, maximum, total, spread):
    """Add a block [LANES, n] to n running maxima, sums of weights, and sums of weights times distance.

    Each thread of a GPU holds the n values of a lane: nothing is exchanged until `merge_lanes`.
    """
    higher = tl.maximum(maximum, tl.max(z, 1))
    base = tl.where(higher == float("-inf"), 0.0, higher)
    fade = exp_kernel(maximum - base)  # 0 at the first block
    shift = tl.where(maximum == float("-inf"), 0.0, maximum - base)
    below = z - base[:, None]
    weight = exp_kernel(below)
    # Where the weight is 0, any finite distance will do; that of -inf would give nan.
    spread = fade * (spread + total * shift) + tl.sum(weight * tl.maximum(below, -1000.0), 1)
    return higher, fade * total + tl.sum(weight, 1), spread


@triton.jit
def merge_lanes(maximum, total, spread):
    """Return maximum, sum and spread over all lanes, scalars."""
    highest = tl.max(maximum, 0)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    fade = exp_kernel(maximum - base)
    shift = tl.where(maximum == float("-inf"), 0.0, maximum - base)
    return highest, tl.sum(fade * total, 0), tl.sum(fade * (spread + total * shift), 0)


@triton.jit(do_not_specialize=["rows", "columns"])
def statistics_kernel(
    logits, label_column, inverse_temperature, out, rows, columns, row_stride,
    PARTS: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Compute the statistics of one part of one row per program; `out` is [PARTS, 4, rows]."""
    # All programs lie on axis 0: the other axes stop at 65,535.
    row = (tl.program_id(0) // PARTS).to(tl.int64)  # rows x columns can exceed 2^31
    part = tl.program_id(0) % PARTS
    width = tl.cdiv(tl.cdiv(columns, PARTS), BLOCK) * BLOCK
    stop = tl.minimum(columns, (part + 1) * width)
    scale = tl.load(inverse_temperature + row)
    LANES: tl.constexpr = BLOCK // VECTOR
    maximum = tl.full((LANES,), float("-inf"), tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    spread = tl.zeros((LANES,), tl.float32)
    offset = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    # Full blocks without a mask, which would split their 16-byte loads; then the remainder.
    full_stop = part * width + (stop - part * width) // BLOCK * BLOCK
    for start in range(part * width, full_stop, BLOCK):
        raw = tl.load(logits + row * row_stride + start + offset).to(tl.float32)
        z, _ = scaled_kernel(raw, scale, SOFTCAP)
        maximum, total, spread = online(z, maximum, total, spread)
    if full_stop < stop:
        column = full_stop + offset
        raw = tl.load(logits + row * row_stride + column, mask=column < stop, other=0.0).to(tl.float32)
        z, _ = scaled_kernel(raw, scale, SOFTCAP)
        maximum, total, spread = online(tl.where(column < stop, z, float("-inf")), maximum, total, spread)
    maximum, total, spread = merge_lanes(maximum, total, spread)
    label = tl.load(label_column + row)
    local = (label >= part * width) & (label < stop)
    raw = tl.load(logits + row * row_stride + label, mask=local, other=0.0).to(tl.float32)
    target, _ = scaled_kernel(raw, scale, SOFTCAP)
    target_row = out + part.to(tl.int64) * 4 * rows + row
    tl.store(target_row, maximum)
    tl.store(target_row + rows, total)
    tl.store(target_row + 2 * rows, spread)
    tl.store(target_row + 3 * rows, tl.where(local, target, 0.0))


def row_statistics(
    logits: Tensor, label_column: Tensor, inverse_temperature: Tensor, softcap: float, columns: int
) -> Tensor:
    """Return the [4, N] fp32 statistics described at `reference`, by the backend of the device."""
    served_by = backend.choose(logits)
    if served_by == "native":
        return native.row_statistics(logits, label_column, inverse_temperature, softcap, columns)
    if served_by == "reference" or not len(logits):
        return reference(logits, label_column, inverse_temperature, softcap, columns)
    # From the columns alone, so that a row's result does not depend on the number of rows.
    parts = max(1, columns // triton_launch.COLUMNS_PER_PART)
    out = torch.empty(parts, 4, len(logits), dtype=torch.float32, device=logits.device)
    statistics_kernel[(len(logits) * parts,)](
        logits, label_column, inverse_temperature, out, len(logits), columns, logits.stride(0),
        PARTS=parts, SOFTCAP=softcap, VECTOR=16 // logits.element_size(),
        **triton_launch.options("statistics", logits.device),
    )  # fmt: skip
    return out[0] if parts == 1 else combine(out).statistics

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
from oreal_kernels.softcap import scaled, scaled_kernel


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
    """Add a block of values to the running maximum, sum of weights, and sum of weights times distance."""
    higher = tl.maximum(maximum, tl.max(z, 0))
    base = tl.where(higher == float("-inf"), 0.0, higher)
    fade = tl.exp(maximum - base)  # 0 at the first block
    shift = tl.where(maximum == float("-inf"), 0.0, maximum - base)
    weight = tl.exp(z - base)
    spread = fade * (spread + total * shift) + tl.sum(tl.where(weight > 0.0, weight * (z - base), 0.0), 0)
    return higher, fade * total + tl.sum(weight, 0), spread


@triton.jit(do_not_specialize=["rows", "columns"])
def statistics_kernel(
    logits, label_column, inverse_temperature, out, rows, columns, row_stride,
    PARTS: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute the statistics of one part of one row per program; `out` is [PARTS, 4, rows]."""
    # All programs lie on axis 0: the other axes stop at 65,535.
    row = (tl.program_id(0) // PARTS).to(tl.int64)  # rows x columns can exceed 2^31
    part = tl.program_id(0) % PARTS
    width = tl.cdiv(tl.cdiv(columns, PARTS), BLOCK) * BLOCK
    stop = tl.minimum(columns, (part + 1) * width)
    scale = tl.load(inverse_temperature + row)
    maximum = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    spread = tl.full((), 0.0, tl.float32)
    # Full blocks without a mask, which would split their 16-byte loads; then the remainder.
    full_stop = part * width + (stop - part * width) // BLOCK * BLOCK
    for start in range(part * width, full_stop, BLOCK):
        raw = tl.load(logits + row * row_stride + start + tl.arange(0, BLOCK)).to(tl.float32)
        z, _ = scaled_kernel(raw, scale, SOFTCAP)
        maximum, total, spread = online(z, maximum, total, spread)
    if full_stop < stop:
        column = full_stop + tl.arange(0, BLOCK)
        raw = tl.load(logits + row * row_stride + column, mask=column < stop, other=0.0).to(tl.float32)
        z, _ = scaled_kernel(raw, scale, SOFTCAP)
        maximum, total, spread = online(tl.where(column < stop, z, float("-inf")), maximum, total, spread)
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
        PARTS=parts, SOFTCAP=softcap, **triton_launch.options("statistics", logits.device),
    )  # fmt: skip
    return out[0] if parts == 1 else combine(out).statistics

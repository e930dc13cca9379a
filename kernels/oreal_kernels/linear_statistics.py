"""Statistics of each row of hidden x weight^T without writing the logits: forward only.

cuBLAS with a pass over its result is faster for wide hidden states; this kernel is for narrow ones.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from oreal_kernels import triton_launch
from oreal_kernels.combine import combine
from oreal_kernels.row_statistics import reference as row_statistics_reference
from oreal_kernels.softcap import exp_kernel, scaled_kernel


def reference(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V', H] of one rank
    label_column: Tensor,  # [N]
    inverse_temperature: Tensor,  # [N]
    softcap: float,
    columns: int,
    logits_dtype: torch.dtype,  # dtype that the product is rounded to
) -> Tensor:
    """Return the [4, N] statistics (see row_statistics.py) of the product, in plain torch."""
    product = (hidden.float() @ weight.float().t()).to(logits_dtype)
    return row_statistics_reference(product, label_column, inverse_temperature, softcap, columns)


@triton.jit(do_not_specialize=["rows", "columns"])
def linear_statistics_kernel(
    hidden, weight, label_column, inverse_temperature, out, rows, columns, width, hidden_stride, weight_stride, units,
    EVEN: tl.constexpr, ROUND: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_HIDDEN: tl.constexpr,
):  # fmt: skip
    """Compute the statistics of BLOCK_ROWS rows of one part of the vocabulary per program."""
    # Programs of one part of the vocabulary are neighbours, so that its weights stay in the L2 cache.
    blocks = tl.cdiv(rows, BLOCK_ROWS)
    part = (tl.program_id(0) // blocks).to(tl.int64)
    row = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = row < rows
    # Past the end the last row is read again instead of a mask, which would cost the loop a test per load.
    x_row = hidden + tl.minimum(row, rows - 1)[:, None] * hidden_stride + tl.arange(0, BLOCK_HIDDEN)[None, :]
    label = tl.load(label_column + row, mask=inside, other=-1)
    scale = tl.load(inverse_temperature + row, mask=inside, other=1.0)[:, None]
    maximum = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    spread = tl.zeros((BLOCK_ROWS,), tl.float32)
    target = tl.zeros((BLOCK_ROWS,), tl.float32)
    stop = tl.minimum(columns, (part + 1) * width)
    for start in range(part * width, stop, BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS)
        product = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
        w_row = weight + tl.minimum(column, columns - 1).to(tl.int64)[None, :] * weight_stride
        w_row += tl.arange(0, BLOCK_HIDDEN)[:, None]
        for first in range(0, units, BLOCK_HIDDEN):
            if EVEN:
                x = tl.load(x_row + first)
                w = tl.load(w_row + first)
            else:
                unit = first + tl.arange(0, BLOCK_HIDDEN)
                x = tl.load(x_row + first, mask=unit[None, :] < units, other=0.0)
                w = tl.load(w_row + first, mask=unit[:, None] < units, other=0.0)
            product = tl.dot(x, w, product, input_precision="ieee")
        if ROUND:  # as written logits would be: the backward and other ranks see those
            product = product.to(hidden.dtype.element_ty).to(tl.float32)
        z, _ = scaled_kernel(product, scale, SOFTCAP)
        z = tl.where(column[None, :] < stop, z, float("-inf"))
        higher = tl.maximum(maximum, tl.max(z, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        fade = exp_kernel(maximum - base)
        shift = tl.where(maximum == float("-inf"), 0.0, maximum - base)
        probability = exp_kernel(z - base[:, None])
        distance = tl.where(probability > 0.0, z - base[:, None], 0.0)
        spread = fade * (spread + total * shift) + tl.sum(probability * distance, 1)
        total = fade * total + tl.sum(probability, 1)
        target += tl.sum(tl.where((column[None, :] == label[:, None]) & (column[None, :] < stop), z, 0.0), 1)
        maximum = higher
    target_row = out + part * 4 * rows + row
    tl.store(target_row, maximum, mask=inside)
    tl.store(target_row + rows, total, mask=inside)
    tl.store(target_row + 2 * rows, spread, mask=inside)
    tl.store(target_row + 3 * rows, target, mask=inside)


def linear_statistics(
    hidden: Tensor,
    weight: Tensor,
    label_column: Tensor,
    inverse_temperature: Tensor,
    softcap: float,
    columns: int,
    logits_dtype: torch.dtype,
) -> Tensor:
    """Return the [4, N] fp32 statistics of hidden x weight^T; needs a GPU or Triton's interpreter."""
    rows, options = len(hidden), triton_launch.options("linear_statistics", hidden.device)
    parts = max(1, columns // triton_launch.COLUMNS_PER_PART)
    width = triton.cdiv(triton.cdiv(columns, parts), options["BLOCK_COLUMNS"]) * options["BLOCK_COLUMNS"]
    out = torch.empty(parts, 4, rows, dtype=torch.float32, device=hidden.device)
    linear_statistics_kernel[(triton.cdiv(rows, options["BLOCK_ROWS"]) * parts,)](
        hidden, weight, label_column, inverse_temperature, out, rows, columns, width,
        hidden.stride(0), weight.stride(0), hidden.shape[1], EVEN=hidden.shape[1] % options["BLOCK_HIDDEN"] == 0,
        ROUND=logits_dtype is hidden.dtype and hidden.dtype is not torch.float32, SOFTCAP=softcap, **options,
    )  # fmt: skip
    return out[0] if parts == 1 else combine(out).statistics

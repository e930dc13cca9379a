"""Gradient of the logits from a = dL/d(log-prob) and b = dL/d(entropy) of each row, in place if wanted.

dz_v = a (1[v = label] - p_v) - b p_v (log p_v + entropy),     dlogit_v = dz_v dz/dlogit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from oreal_kernels import backend, native, triton_launch
from oreal_kernels.softcap import exp_kernel, scaled, scaled_kernel


def reference(
    logits: Tensor,  # [N, V'] of one rank, padding included
    out: Tensor,  # [N, V'], may be `logits` itself; its padding is set to 0
    label_column: Tensor,  # [N] int64; outside [0, columns): not on this rank
    inverse_temperature: Tensor,  # [N]
    softcap: float,
    columns: int,
    maximum: Tensor,  # [N] of z over all ranks
    log_total: Tensor,  # [N] log-sum-exp minus the maximum
    entropy: Tensor,  # [N] over all ranks
    a: Tensor,  # [N]
    b: Tensor,  # [N]
) -> None:
    """Fill `out`, in plain torch. Rows with a = b = 0, and rows of -inf only, become 0 whatever their logits are."""
    z, slope = scaled(logits[:, :columns], inverse_temperature, softcap)
    log_p = z - maximum.to(z.dtype)[:, None] - log_total.to(z.dtype)[:, None]
    p = torch.exp(log_p)
    a, b = a.to(z.dtype)[:, None], b.to(z.dtype)[:, None]
    surprise = torch.where(p > 0, p * (log_p + entropy.to(z.dtype)[:, None]), 0)
    gradient = -a * p - b * surprise
    rows = torch.nonzero((label_column >= 0) & (label_column < columns))[:, 0]
    at_label = (rows, label_column[rows])
    # 1 - p before any rounding: small gradients of likely tokens survive.
    gradient[at_label] = -a[rows, 0] * torch.expm1(log_p[at_label]) - b[rows, 0] * surprise[at_label]
    silent = ((a == 0) & (b == 0)) | (maximum == -torch.inf)[:, None]
    out[:, :columns] = torch.where(silent, 0, gradient * slope)
    out[:, columns:] = 0


@triton.jit
def entries(raw, scale, highest, normaliser, h, a, b, ENTROPY: tl.constexpr, SOFTCAP: tl.constexpr):
    """Return the gradient of a block of one row without a label in it."""
    z, slope = scaled_kernel(raw, scale, SOFTCAP)
    log_p = z - highest - normaliser
    p = exp_kernel(log_p)
    if ENTROPY:
        return (-a * p - b * tl.where(p > 0.0, p * (log_p + h), 0.0)) * slope
    else:
        return p * (-a * slope)


@triton.jit
def label_entry(raw, scale, highest, normaliser, h, a, b, ENTROPY: tl.constexpr, SOFTCAP: tl.constexpr):
    """Return the gradient of the label's logit."""
    z, slope = scaled_kernel(raw, scale, SOFTCAP)
    log_p = z - highest - normaliser
    p = exp_kernel(log_p)
    # -expm1 by its series near 0, because the interpreter has no libdevice.
    series = -log_p * (1.0 + log_p / 2.0 * (1.0 + log_p / 3.0 * (1.0 + log_p / 4.0)))
    gradient = a * tl.where(log_p > -0.03, series, 1.0 - p)
    if ENTROPY:
        gradient -= b * tl.where(p > 0.0, p * (log_p + h), 0.0)
    return gradient * slope


@triton.jit(do_not_specialize=["columns", "all_columns"])
def gradient_kernel(
    logits, out, label_column, inverse_temperature, maximum, log_total, entropy, a, b,
    columns, all_columns, row_stride, out_stride,
    PARTS: tl.constexpr, ENTROPY: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the gradient of one part of one row per program. Without ENTROPY, `b` is taken as 0 and not read."""
    row = (tl.program_id(0) // PARTS).to(tl.int64)  # rows x columns can exceed 2^31
    part = tl.program_id(0) % PARTS
    width = tl.cdiv(tl.cdiv(all_columns, PARTS), BLOCK) * BLOCK
    stop = tl.minimum(all_columns, (part + 1) * width)
    scale = tl.load(inverse_temperature + row)
    label = tl.load(label_column + row)
    highest = tl.load(maximum + row)
    normaliser = tl.load(log_total + row)
    row_a = tl.load(a + row)
    row_b = tl.load(b + row) if ENTROPY else 0.0
    h = tl.load(entropy + row)
    # A row without coefficients becomes zeros, whatever its logits are; so does a row of -inf only.
    columns = tl.where((row_a == 0.0) & (row_b == 0.0), 0, columns)
    columns = tl.where(highest == float("-inf"), 0, columns)
    # The label's entry is written last: a test of every element would cost the loop more than all else.
    local = (label >= part * width) & (label < tl.minimum(columns, stop))
    label_raw = tl.load(logits + row * row_stride + label, mask=local, other=0.0).to(tl.float32)
    tl.debug_barrier()  # before `out`, which may be `logits`, is written
    # Full blocks of the vocabulary without a mask, which would split their 16-byte loads; then the remainder.
    full_stop = part * width + tl.maximum(tl.minimum(columns, stop) - part * width, 0) // BLOCK * BLOCK
    for start in range(part * width, full_stop, BLOCK):
        column = start + tl.arange(0, BLOCK)
        raw = tl.load(logits + row * row_stride + column).to(tl.float32)
        gradient = entries(raw, scale, highest, normaliser, h, row_a, row_b, ENTROPY, SOFTCAP)
        tl.store(out + row * out_stride + column, gradient.to(out.dtype.element_ty))
    for start in range(full_stop, stop, BLOCK):
        column = start + tl.arange(0, BLOCK)
        real = column < tl.minimum(columns, stop)
        raw = tl.load(logits + row * row_stride + column, mask=real, other=0.0).to(tl.float32)
        gradient = entries(raw, scale, highest, normaliser, h, row_a, row_b, ENTROPY, SOFTCAP)
        tl.store(
            out + row * out_stride + column, tl.where(real, gradient, 0.0).to(out.dtype.element_ty), mask=column < stop
        )
    tl.debug_barrier()  # after another thread has written the label's column
    gradient = label_entry(label_raw, scale, highest, normaliser, h, row_a, row_b, ENTROPY, SOFTCAP)
    tl.store(out + row * out_stride + label, gradient.to(out.dtype.element_ty), mask=local)


def row_gradient(
    logits: Tensor,
    out: Tensor,
    label_column: Tensor,
    inverse_temperature: Tensor,
    softcap: float,
    columns: int,
    maximum: Tensor,
    log_total: Tensor,
    entropy: Tensor,
    a: Tensor,
    b: Tensor | None,
) -> None:
    """Fill `out` as described at `reference`, by the backend of the device; `b` None stands for zeros, faster."""
    served_by = backend.choose(logits, out)
    if served_by == "triton" and logits.numel():
        parts = max(1, logits.shape[1] // triton_launch.COLUMNS_PER_PART)
        gradient_kernel[(len(logits) * parts,)](
            logits, out, label_column, inverse_temperature, maximum, log_total, entropy, a, b,
            columns, logits.shape[1], logits.stride(0), out.stride(0),
            PARTS=parts, ENTROPY=b is not None, SOFTCAP=softcap, **triton_launch.options("gradient", logits.device),
        )  # fmt: skip
        return
    compute = native.row_gradient if served_by == "native" else reference
    b = torch.zeros_like(a) if b is None else b
    compute(logits, out, label_column, inverse_temperature, softcap, columns, maximum, log_total, entropy, a, b)


def row_coefficients(
    counted: Tensor, grad_logp: Tensor | None, grad_entropy: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return `a` and `b` [N] from the gradients that autograd gives, 0 for rows that do not count."""
    a = torch.zeros_like(counted, dtype=torch.float32) if grad_logp is None else grad_logp.float()
    b = None if grad_entropy is None else torch.where(counted, grad_entropy.float(), 0)
    return torch.where(counted, a, 0), b

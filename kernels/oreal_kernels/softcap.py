"""Logits that the softmax sees, z = softcap tanh(logit / softcap) / temperature, and dz/dlogit."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """Return fp64 for fp64, which makes the references oracles, and fp32 for any other dtype."""
    return torch.float64 if tensor.dtype is torch.float64 else torch.float32


def scaled(logits: Tensor, inverse_temperature: Tensor, softcap: float) -> tuple[Tensor, Tensor]:
    """Return z [N, V] and dz/dlogit, which broadcasts over it. A softcap of 0 means none."""
    z = logits.to(accumulation_dtype(logits))
    scale = inverse_temperature.to(z.dtype)[:, None]
    if not softcap:
        return z * scale, scale
    bent = torch.tanh(z / softcap)
    return softcap * bent * scale, (1 - bent * bent) * scale


@triton.jit
def exp_kernel(x):
    """Return exp(x); results below 2^-126 become 0.

    tl.exp is the same product and power of two, with four more instructions for results that small.
    """
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def scaled_kernel(raw, scale, SOFTCAP: tl.constexpr):
    """Return z and dz/dlogit of a block of one row."""
    if SOFTCAP == 0.0:
        z = raw * scale
        slope = tl.zeros_like(raw) + scale
    else:
        # tanh by exp, because the interpreter has no libdevice; at the far end exp is inf and tanh -1.
        bent = 2.0 / (1.0 + tl.exp(-2.0 * raw / SOFTCAP)) - 1.0
        z = SOFTCAP * bent * scale
        slope = (1.0 - bent * bent) * scale
    return z, slope

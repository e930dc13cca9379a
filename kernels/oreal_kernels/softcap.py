"""z = softcap tanh(logit / softcap) / temperature, the logits that the softmax sees, and dz/dlogit."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """fp64 stays fp64, which makes the references oracles; all else is computed in fp32."""
    return torch.float64 if tensor.dtype is torch.float64 else torch.float32


def scaled(logits: Tensor, inverse_temperature: Tensor, softcap: float) -> tuple[Tensor, Tensor | float]:
    """z [N, V] and dz/dlogit, which broadcasts over it."""
    z = logits.to(accumulation_dtype(logits))
    scale = inverse_temperature.to(z.dtype)[:, None]
    if not softcap:
        return z * scale, scale
    bent = torch.tanh(z / softcap)
    return softcap * bent * scale, (1 - bent * bent) * scale


@triton.jit
def scaled_kernel(raw, scale, SOFTCAP: tl.constexpr):
    """As `scaled`, for a block of one row."""
    if SOFTCAP == 0.0:
        z = raw * scale
        slope = tl.zeros_like(raw) + scale
    else:
        # tanh by exp, as libdevice is not there in the interpreter; at the far end exp is inf and tanh -1.
        bent = 2.0 / (1.0 + tl.exp(-2.0 * raw / SOFTCAP)) - 1.0
        z = SOFTCAP * bent * scale
        slope = (1.0 - bent * bent) * scale
    return z, slope

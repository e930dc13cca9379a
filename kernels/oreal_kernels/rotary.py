"""Rotary position embedding of queries or keys, by the cosines and sines of each row.

    y1 = x1 cos - x2 sin,  y2 = x2 cos + x1 sin        x1, x2: halves of a head, in fp32

Its gradient is the rotation by the opposite angles, so that nothing but cosines and sines is saved.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from oreal_kernels import backend, triton_launch


def reference(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Compute the same in plain torch, see `rotary`; in fp64 if both are."""
    wide = torch.promote_types(x.dtype, torch.float32)
    low, high = x.to(wide).chunk(2, -1)
    cos, sin = cos_sin.to(wide)[:, None].chunk(2, -1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1).to(x.dtype)


@triton.jit(do_not_specialize=["heads"])
def rotary_kernel(
    x, cos_sin, out, heads, x_row_stride, x_head_stride, out_row_stride, out_head_stride,
    HALF: tl.constexpr, COLUMNS: tl.constexpr, SIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rotate all heads of one row per program, BLOCK of them at a time. COLUMNS: the power of 2 from HALF on."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    cos = tl.load(cos_sin + row * (2 * HALF) + column, mask=column < HALF, other=0.0)
    sin = tl.load(cos_sin + row * (2 * HALF) + HALF + column, mask=column < HALF, other=0.0) * SIGN
    for first in range(0, heads, BLOCK):
        head = first + tl.arange(0, BLOCK)
        inside = (head < heads)[:, None] & (column < HALF)[None, :]
        source = x + row * x_row_stride + head[:, None] * x_head_stride + column[None, :]
        low = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        high = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
        target = out + row * out_row_stride + head[:, None] * out_head_stride + column[None, :]
        tl.store(target, low * cos[None, :] - high * sin[None, :], mask=inside)
        tl.store(target + HALF, high * cos[None, :] + low * sin[None, :], mask=inside)


def _rotate(x: Tensor, cos_sin: Tensor, sign: float) -> Tensor:
    """Rotate by the angles (sign 1) or back (sign -1)."""
    if backend.choose(x) != "triton" or not x.numel():
        cos, sin = cos_sin.chunk(2, -1)
        return reference(x, torch.cat([cos, sign * sin], -1))
    x = x if x.stride(-1) == 1 else x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    half = x.shape[-1] // 2
    rotary_kernel[(len(x),)](
        x, cos_sin, out, x.shape[1], x.stride(0), x.stride(1), out.stride(0), out.stride(1),
        HALF=half, COLUMNS=triton.next_power_of_2(half), SIGN=sign, **triton_launch.options("rotary", x.device),
    )  # fmt: skip
    return out


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos_sin):
        ctx.save_for_backward(cos_sin)
        return _rotate(x, cos_sin, 1.0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        (cos_sin,) = ctx.saved_tensors
        return _rotate(gradient, cos_sin, -1.0), None


def rotary(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotate each head of each row; differentiable in x.

    Args:
        x: [S, heads, d] queries or keys, fp32, bf16 or fp16; any strides.
        cos_sin: [S, d] fp32, d / 2 cosines and then d / 2 sines of each row's angles.

    Returns:
        [S, heads, d] in the dtype of x, rounded once.

    Raises:
        ValueError: shapes do not fit, or d is odd.
    """
    if x.dim() != 3 or x.shape[-1] % 2 or cos_sin.shape != (len(x), x.shape[-1]):
        raise ValueError(
            f"x has shape {list(x.shape)} and cos_sin {list(cos_sin.shape)}; expected [S, heads, d] with an even d, "
            "and [S, d]"
        )
    return _Rotary.apply(x, cos_sin.detach().contiguous())

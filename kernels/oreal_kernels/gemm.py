"""Matrix products of a language-model head, by cuBLAS and oneDNN; this module adds sums in fp32 for bf16 operands."""

from __future__ import annotations

import torch
from torch import Tensor

from oreal_kernels import backend, native

_COLUMNS_AT_ONCE = 8192  # of the vocabulary, where a product needs a buffer before it is added


def logits(hidden: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """Compute out [n, V] = hidden [n, H] weight [V, H]^T; `out` may be fp32 where the operands are bf16."""
    if out.dtype is hidden.dtype:
        return torch.mm(hidden, weight.t(), out=out)
    if hidden.is_cuda:
        return torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)
    wide = hidden.to(out.dtype)  # torch has no mixed product on CPU; in blocks, because the weight is large
    for first in range(0, len(weight), _COLUMNS_AT_ONCE):
        block = slice(first, first + _COLUMNS_AT_ONCE)
        out[:, block] = wide @ weight[block].to(out.dtype).t()
    return out


def add_weight_gradient(dlogits: Tensor, hidden: Tensor, total: Tensor) -> None:
    """Add dlogits [n, V]^T hidden [n, H] to total [V, H], summed in the dtype of `total`, usually fp32."""
    if total.dtype is dlogits.dtype:
        total.addmm_(dlogits.t(), hidden)
    elif total.is_cuda:
        torch.addmm(total, dlogits.t(), hidden, out_dtype=total.dtype, out=total)
    elif backend.choose(dlogits, hidden, total) != "native" or not native.add_weight_gradient(dlogits, hidden, total):
        wide = hidden.to(total.dtype)
        for first in range(0, len(total), _COLUMNS_AT_ONCE):
            block = slice(first, first + _COLUMNS_AT_ONCE)
            total[block].addmm_(dlogits[:, block].t().to(total.dtype), wide)

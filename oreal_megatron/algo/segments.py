"""Operations on tokens of several sequences laid end to end; cu_seqlens [B+1] holds their borders."""

from __future__ import annotations

import torch
from torch import Tensor


def lengths(cu_seqlens: Tensor) -> Tensor:
    """[B] tokens of each sequence."""
    return cu_seqlens.diff()


def mean(values_T: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[B] mean over each sequence; 0 for an empty one."""
    count = lengths(cu_seqlens)
    owner = torch.repeat_interleave(torch.arange(len(count), device=values_T.device), count)
    total = torch.zeros(len(count), dtype=values_T.dtype, device=values_T.device).index_add(0, owner, values_T)
    return total / count.clamp(min=1)


def running_mean(values_T: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[T] mean of a sequence's values up to and with each token, summed in fp64 so that borders do not leak."""
    count = lengths(cu_seqlens)
    total = values_T.double().cumsum(0)
    before = torch.cat([total.new_zeros(1), total])[cu_seqlens[:-1]]  # [B] sum of everything before the sequence
    place = torch.arange(len(values_T), device=values_T.device) - torch.repeat_interleave(cu_seqlens[:-1], count) + 1
    return ((total - torch.repeat_interleave(before, count)) / place).to(values_T.dtype)

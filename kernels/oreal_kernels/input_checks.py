"""Checks of input values that every implementation relies on.

On the CPU they raise ValueError at once. On a GPU they do not wait for the device: the error shows at a later call.
"""

from __future__ import annotations

import torch
from torch import Tensor


def require(valid: Tensor, message: str) -> None:
    """Raise ValueError unless the scalar is true, without making the host wait for a GPU."""
    if valid.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async(valid, message)
    elif not valid:
        raise ValueError(message)


def check_offsets(cu_seqlens: Tensor, tokens: int) -> int:
    """Check that offsets rise from 0 to the number of tokens; return the number of sequences."""
    if cu_seqlens.dim() != 1 or not len(cu_seqlens) or cu_seqlens.dtype.is_floating_point:
        raise ValueError(
            f"cu_seqlens is {cu_seqlens.dtype} {list(cu_seqlens.shape)}; expected integers [sequences + 1]"
        )
    rises = (cu_seqlens.diff() >= 0).all() & (cu_seqlens[0] == 0) & (cu_seqlens[-1] == tokens)
    require(rises, f"cu_seqlens does not rise from 0 to the {tokens} tokens")
    return len(cu_seqlens) - 1


def check_length(name: str, tensor: Tensor, length: int) -> None:
    """Raise ValueError unless the tensor is a vector of this length."""
    if tensor.shape != (length,):
        raise ValueError(f"{name} has shape {list(tensor.shape)}; expected [{length}]")

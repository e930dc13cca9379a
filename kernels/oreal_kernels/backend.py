"""Choice of the implementation of an operation: Triton on GPUs, the native library on CPUs, plain torch elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from oreal_kernels import native

NAMES = ("triton", "native", "reference")
_NATIVE_DTYPES = (torch.float32, torch.bfloat16)
_forced: str | None = None  # a plain global: autograd's backward thread must see it too


def choose(*tensors: Tensor) -> str:
    """Return the backend for an operation on these tensors, all on one device."""
    if _forced is not None:
        return _forced
    if all(tensor.is_cuda for tensor in tensors):
        return "triton"
    if all(tensor.device.type == "cpu" and tensor.dtype in _NATIVE_DTYPES for tensor in tensors):
        return "native" if native.available() else "reference"
    return "reference"


@contextmanager
def use(name: str) -> Iterator[None]:
    """Run every operation by one backend within the context, e.g. to compare two.

    Triton on CPU tensors needs TRITON_INTERPRET=1. Raises ValueError for an unknown name.
    """
    global _forced
    if name not in NAMES:
        raise ValueError(f"backend is {name!r}; expected one of {', '.join(NAMES)}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before

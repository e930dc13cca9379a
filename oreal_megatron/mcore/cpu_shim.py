"""Megatron-core on machines without a GPU: `with device_layer():` around every call into Megatron.

Megatron-core 0.16.1 names CUDA in many places where a CPU tensor would do. On a GPU machine this file does nothing.
Without one, it stands in for the few torch.cuda functions that Megatron calls, and for the two tensor factories that it
gives `device="cuda"`; a TorchFunctionMode would do as well, but see every call of torch. It is entered only around
Megatron calls, because transformers and vLLM probe torch.cuda. Each row of PATCHES has a test in
tests/dist/test_cpu_layer.py that fails without it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.tensor_parallel import random as megatron_random
from torch import Tensor


def _on_cpu(factory: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same factory, deaf to `device="cuda"`."""

    def made(*args: Any, **kwargs: Any) -> Tensor:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return made


def _type(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    """What DistributedOptimizer compares with the names of CUDA tensors."""
    answer = _TYPE(tensor, *args, **kwargs)
    return f"torch.cuda.{answer.rpartition('.')[2]}" if isinstance(answer, str) else answer


_TYPE = torch.Tensor.type


def _nothing(*args: Any, **kwargs: Any) -> None: ...


# What is replaced, where, and by what.
PATCHES: dict[str, tuple[Any, str, Any]] = {
    "current_device": (torch.cuda, "current_device", lambda: "cpu"),
    "synchronize": (torch.cuda, "synchronize", _nothing),
    "get_rng_state": (torch.cuda, "get_rng_state", lambda *args, **kwargs: torch.get_rng_state()),
    "manual_seed": (torch.cuda, "manual_seed", lambda seed: torch.manual_seed(seed)),
    "tensor": (torch, "tensor", _on_cpu(torch.tensor)),
    "zeros": (torch, "zeros", _on_cpu(torch.zeros)),
    "Tensor.type": (torch.Tensor, "type", _type),
    "Tensor.cuda": (torch.Tensor, "cuda", lambda tensor, *args, **kwargs: tensor),
    "_get_cuda_rng_state": (megatron_random, "_get_cuda_rng_state", lambda *args, **kwargs: torch.get_rng_state()),
    "_set_cuda_rng_state": (megatron_random, "_set_cuda_rng_state", lambda state, *a, **k: torch.set_rng_state(state)),
}

_entered = False


@contextlib.contextmanager
def device_layer(without: str | None = None) -> Iterator[None]:
    """Let Megatron run here. `without` leaves one patch out, for the test that each is needed."""
    if _entered or torch.cuda.is_available():
        yield
        return
    with standing_in({name: patch for name, patch in PATCHES.items() if name != without}):
        yield


@contextlib.contextmanager
def standing_in(patches: dict[str, tuple[Any, str, Any]]) -> Iterator[None]:
    """Replace what `patches` name; within, `device_layer` adds nothing."""
    global _entered
    saved = [(owner, attribute, getattr(owner, attribute)) for owner, attribute, _ in patches.values()]
    _entered = True
    try:
        for owner, attribute, stand_in in patches.values():
            setattr(owner, attribute, stand_in)
        yield
    finally:
        for owner, attribute, original in saved:
            setattr(owner, attribute, original)
        _entered = False

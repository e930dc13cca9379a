"""Megatron-core on machines without a GPU: `with device_layer():` around every call into Megatron.

Megatron-core 0.16.1 names CUDA in many places where a CPU tensor would do. On a GPU machine this file does nothing.
Without one, it stands in for the few torch.cuda functions that Megatron calls and rewrites `device="cuda"` in tensor
factories. It is entered only around Megatron calls, because a global function mode would slow vLLM's Python, and
because transformers and vLLM probe torch.cuda. Each row of PATCHES has a test in tests/dist/test_cpu_layer.py that
fails without it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.tensor_parallel import random as megatron_random
from torch.overrides import TorchFunctionMode


class _OnCpu(TorchFunctionMode):
    """Rewrites factories' `device="cuda"`, and lets CPU tensors pass DistributedOptimizer's test of their type."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs = {**kwargs, "device": "cpu"}
        if function is torch.Tensor.type and len(args) == 1 and not kwargs:
            return function(*args).replace("torch.", "torch.cuda.", 1)  # distrib_optimizer.py compares these strings
        return function(*args, **kwargs)


def _nothing(*args: Any, **kwargs: Any) -> None: ...


# What is replaced, where, and by what.
PATCHES: dict[str, tuple[Any, str, Any]] = {
    "current_device": (torch.cuda, "current_device", lambda: "cpu"),
    "synchronize": (torch.cuda, "synchronize", _nothing),
    "get_rng_state": (torch.cuda, "get_rng_state", lambda *args, **kwargs: torch.get_rng_state()),
    "manual_seed": (torch.cuda, "manual_seed", lambda seed: torch.manual_seed(seed)),
    "Tensor.cuda": (torch.Tensor, "cuda", lambda tensor, *args, **kwargs: tensor),
    "_get_cuda_rng_state": (megatron_random, "_get_cuda_rng_state", lambda *args, **kwargs: torch.get_rng_state()),
    "_set_cuda_rng_state": (megatron_random, "_set_cuda_rng_state", lambda state, *a, **k: torch.set_rng_state(state)),
}

_entered = False


@contextlib.contextmanager
def device_layer(without: str | None = None) -> Iterator[None]:
    """Let Megatron run here. `without` leaves one patch out, for the test that each is needed."""
    global _entered
    if _entered or torch.cuda.is_available():
        yield
        return
    patches = {name: patch for name, patch in PATCHES.items() if name != without}
    saved = [(owner, attribute, getattr(owner, attribute)) for owner, attribute, _ in patches.values()]
    _entered = True
    try:
        for owner, attribute, stand_in in patches.values():
            setattr(owner, attribute, stand_in)
        with contextlib.nullcontext() if without == "function_mode" else _OnCpu():
            yield
    finally:
        for owner, attribute, original in saved:
            setattr(owner, attribute, original)
        _entered = False

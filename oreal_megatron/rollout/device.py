"""The engine's GPU, which it shares with the trainer: memory of a sleeping and waking engine, errors that stay."""

from __future__ import annotations

import gc
from typing import Protocol

import torch


class Sleeper(Protocol):
    """vLLM's LLM, as far as its sleep mode is concerned."""

    def sleep(self, level: int) -> None:
        """Unmap memory: level 2 discards weights and KV cache."""
        ...

    def wake_up(self, tags: list[str]) -> None:
        """Map the memory of "weights" or "kv_cache" again, at the same addresses, with undefined contents."""
        ...


class EngineMemory:
    """Weights and KV cache of an engine: mapped while it is awake, free for the trainer while it sleeps.

    vLLM maps physical memory beside torch's allocator. What the trainer has freed, torch still reserves, and the
    driver does not give it to anyone else: without emptying torch's cache first, waking up runs out of memory although
    the models are offloaded.
    """

    def __init__(self, llm: Sleeper, can_sleep: bool):
        self.llm, self.can_sleep, self.awake = llm, can_sleep, True

    def release(self) -> None:
        """Release weights and KV cache, where the platform can."""
        if self.can_sleep and self.awake:
            self.llm.sleep(level=2)
            self.awake = False

    def allocate_weights(self) -> None:
        """Allocate the weights of a sleeping engine; the KV cache follows in `allocate_cache`."""
        if not self.awake:
            _return_unused_memory()
            self.llm.wake_up(["weights"])

    def allocate_cache(self) -> None:
        """Allocate the KV cache of an engine whose weights have arrived; it is awake then."""
        if not self.awake:
            _return_unused_memory()  # of the transfer and of the trainer's weights
            self.llm.wake_up(["kv_cache"])
            self.awake = True


def is_device_error(error: Exception) -> bool:
    """Return whether the GPU reported an error. All later calls of the process fail with it: no retry can help."""
    return isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error)


def _return_unused_memory() -> None:
    """Return to the driver what torch's allocator reserves without using it; no effect without a GPU."""
    gc.collect()  # tensors in reference cycles count as used
    torch.cuda.empty_cache()

"""Stage of tools/gpu_acceptance.py: the memory of a sleeping engine beside torch's allocator. One GPU."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch

from gpu_stages.machine import NOT_JUDGED, Machine, Row
from oreal_megatron.rollout.device import EngineMemory

GIB = 2**30


def sleep(machine: Machine) -> Iterator[Row]:
    """Put memory of vLLM's allocator to sleep below a captured graph, fill torch's cache, and wake it."""
    if not machine.dry and importlib.util.find_spec("vllm") is None:
        yield Row("sleep", "memory of a sleeping engine", "vLLM is not installed", "graph sees new weights", NOT_JUDGED)
        return
    allocator = _NoAllocator() if machine.dry else _vllm_allocator()
    sizes = {"weights": 15.2, "kv_cache": 16.0}  # GB: 7B in bf16
    pools = {}
    for tag, gigabytes in sizes.items():
        with allocator.use_memory_pool(tag=tag):
            count = 2048 if machine.dry else int(gigabytes * 1e9 / 2)
            pools[tag] = torch.ones(count, dtype=torch.bfloat16, device=machine.device)
    weights, cache = pools["weights"], pools["kv_cache"]
    total, addresses = torch.zeros(1, device=machine.device), [weights.data_ptr(), cache.data_ptr()]

    def read() -> None:
        total.copy_(weights[:1024].float().sum() + cache[:1024].float().sum())

    replay = read if machine.dry else _captured(read)
    memory = EngineMemory(_Sleeper(allocator), can_sleep=True)
    yield machine.measured("sleep", "release of weights and cache", _seconds(machine, memory.release), "s")
    _fill_cache_of_torch(machine)
    yield machine.measured("sleep", "memory free for waking up beside torch's cache", machine.free_gib(), "GiB")
    yield machine.measured("sleep", "waking of the weights", _seconds(machine, memory.allocate_weights), "s")
    weights.fill_(2)
    yield machine.measured("sleep", "waking of the cache", _seconds(machine, memory.allocate_cache), "s")
    cache.fill_(3)
    replay()
    yield machine.at_most("sleep", "difference of what the graph reads", abs(float(total) - 5 * 1024), 0)
    moved = sum(a != b for a, b in zip(addresses, [weights.data_ptr(), cache.data_ptr()], strict=True))
    yield machine.at_most("sleep", "memory that moved", moved, 0)
    memory.release()
    _fill_cache_of_torch(machine)
    yield Row("sleep", "waking without emptying torch's cache", _outcome(allocator.wake_up), "measured", NOT_JUDGED)


def _outcome(wake_up: Callable[[], None]) -> str:
    """Return how vLLM's own wake-up ends; it is the last act of the stage's process."""
    try:
        wake_up()
    except Exception as error:
        return f"fails: {error}"[:60]
    return "succeeds"


def _seconds(machine: Machine, function: Callable[[], None]) -> float:
    """Return the time of one call."""
    started_at = time.perf_counter()
    function()
    machine.synchronize()
    return time.perf_counter() - started_at


def _fill_cache_of_torch(machine: Machine) -> None:
    """Leave less than a GiB of the GPU to others than torch, which uses nothing of what it has."""
    blocks = 0 if machine.dry else int(machine.free_gib() * 4) - 2
    filling = [torch.empty(GIB // 4, dtype=torch.uint8, device=machine.device) for _ in range(blocks)]
    del filling


def _captured(function: Callable[[], None]) -> Callable[[], None]:
    """Return the replay of a CUDA graph of the function."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


class _Allocator(Protocol):
    """vLLM's CuMemAllocator."""

    def use_memory_pool(self, tag: str) -> AbstractContextManager[None]: ...
    def sleep(self, offload_tags: tuple[str, ...]) -> None: ...
    def wake_up(self, tags: list[str] | None = None) -> None: ...


def _vllm_allocator() -> _Allocator:
    from vllm.device_allocator.cumem import CuMemAllocator

    return CuMemAllocator.get_instance()


class _NoAllocator:
    """Allocator of a dry run: the memory of the CPU stays, so its contents do."""

    def use_memory_pool(self, tag: str) -> AbstractContextManager[None]:
        return nullcontext()

    def sleep(self, offload_tags: tuple[str, ...]) -> None: ...
    def wake_up(self, tags: list[str] | None = None) -> None: ...


class _Sleeper:
    """vLLM's allocator as the sleep mode of its engine uses it."""

    def __init__(self, allocator: _Allocator):
        self.allocator = allocator

    def sleep(self, level: int) -> None:
        """Unmap all memory without a copy."""
        self.allocator.sleep(offload_tags=())

    def wake_up(self, tags: list[str]) -> None:
        """Map the memory of these tags."""
        self.allocator.wake_up(tags)

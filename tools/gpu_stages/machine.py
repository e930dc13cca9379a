"""Device that tools/gpu_acceptance.py checks: measurements of time and memory, and values beside their criteria."""

from __future__ import annotations

import dataclasses
import gc
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

PASSED, FAILED, NOT_JUDGED = "pass", "FAIL", "not judged"
SEED = 0


@dataclasses.dataclass(frozen=True)
class Row:
    """One measured value beside its criterion."""

    stage: str
    check: str
    value: str
    criterion: str
    result: str


@dataclasses.dataclass(frozen=True)
class Machine:
    """The device to check; `dry`: a CPU with small shapes."""

    device: torch.device
    dry: bool

    @property
    def gib(self) -> float:
        """Memory of the device in GiB; 0 in a dry run."""
        return 0.0 if self.dry else torch.cuda.get_device_properties(self.device).total_memory / 2**30

    def free_gib(self) -> float:
        """Return the memory that no process has; 0 in a dry run."""
        return 0.0 if self.dry else torch.cuda.mem_get_info()[0] / 2**30

    def bytes_in_use(self) -> int:
        """Return the memory of all tensors, when cycles of references are gone; 0 in a dry run."""
        if self.dry:
            return 0
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    def at_most(self, stage: str, check: str, value: float, limit: float, unit: str = "", speed: bool = False) -> Row:
        """Return a row that passes up to a limit; speed and memory of a dry run are not judged."""
        result = NOT_JUDGED if self.dry and speed else PASSED if value <= limit else FAILED
        return Row(stage, check, f"{value:.3g} {unit}".strip(), f"<= {limit:.3g} {unit}".strip(), result)

    def at_least(self, stage: str, check: str, value: float, limit: float, unit: str = "") -> Row:
        """Return a row of a speed that passes from a limit on."""
        result = NOT_JUDGED if self.dry else PASSED if value >= limit else FAILED
        return Row(stage, check, f"{value:.3g} {unit}".strip(), f">= {limit:.3g} {unit}".strip(), result)

    def seconds(self, function: Callable[[], object]) -> float:
        """Return the median time of a call."""
        if self.dry:
            start = time.perf_counter()
            function()
            return time.perf_counter() - start
        from triton.testing import do_bench

        return float(do_bench(function, warmup=100, rep=500, return_mode="median")) / 1e3

    def measured(self, stage: str, check: str, value: float, unit: str) -> Row:
        """Return a row without a criterion."""
        return Row(stage, check, f"{value:.3g} {unit}", "measured", NOT_JUDGED)

    def wall_seconds(self, function: Callable[[], object]) -> float:
        """Return the median time of five calls after one, of work on the host included."""
        times = []
        for _ in range(2 if self.dry else 6):
            start = time.perf_counter()
            function()
            self.synchronize()
            times.append(time.perf_counter() - start)
        return statistics.median(times[1:])

    def synchronize(self) -> None:
        """Wait until the device has finished."""
        if not self.dry:
            torch.cuda.synchronize()

    def peak_bytes(self, function: Callable[[], object]) -> float:
        """Return the largest memory of a call beyond what was in use before it; 0 in a dry run."""
        if self.dry:
            function()
            return 0.0
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return float(torch.cuda.max_memory_allocated() - before)

    def random(self, *shape: int, scale: float = 1.0, seed: int = SEED) -> Tensor:
        """Return bf16 normal numbers, the same for the same shape and seed."""
        generator = torch.Generator(self.device).manual_seed(seed + sum(shape))
        return (torch.randn(*shape, generator=generator, device=self.device) * scale).bfloat16()


def use_trainer_products() -> None:
    """Let bf16 products sum in fp32, as the trainer does."""
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def error(result: Tensor, exact: Tensor) -> float:
    """Return the largest difference over the largest magnitude; infinity if any value is not finite."""
    difference = (result.double() - exact.double()).abs().max() / exact.double().abs().max().clamp(min=1e-30)
    return float(difference.nan_to_num(nan=torch.inf))

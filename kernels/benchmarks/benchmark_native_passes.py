"""Time of the native library's passes beside torch's GEMM and copy, in turn because machines are shared.

python kernels/benchmarks/benchmark_native_passes.py --rows 1024 --columns 151936 --width 896
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from oreal_kernels import native


def passes(rows: int, columns: int, width: int) -> dict[str, Callable[[], object]]:
    """Return each pass by its name in the table."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, columns, generator=generator).mul_(3).bfloat16()
    hidden = torch.randn(rows, width, generator=generator).bfloat16()
    dlogits, main_grad = logits.clone(), torch.zeros(columns, width)
    label = torch.randint(0, columns, (rows,), generator=generator)
    ones = torch.ones(rows)
    maximum, total, first, _ = native.row_statistics(logits, label, ones, 0.0, columns)
    gradient = (label, ones, 0.0, columns, maximum, total.log(), total.log() - first / total, ones, 0.1 * ones)
    functions = {
        "torch: copy of the logits": lambda: dlogits.copy_(logits),
        "native: row_statistics": lambda: native.row_statistics(logits, label, ones, 0.0, columns),
        "native: row_gradient in place": lambda: native.row_gradient(dlogits, dlogits, *gradient),
        "torch: mm(dlogits.t(), hidden) to bf16": lambda: torch.mm(dlogits.t(), hidden),
    }
    if native.add_weight_gradient(dlogits, hidden, main_grad):  # only with AVX512-BF16
        functions["native: add_weight_gradient to fp32"] = lambda: native.add_weight_gradient(
            dlogits, hidden, main_grad
        )
    return functions


def milliseconds(function: Callable[[], object]) -> float:
    """Return the duration of one call."""
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1e3


def main() -> None:
    """Print median, minimum and maximum of each pass."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--columns", type=int, default=151936)
    parser.add_argument("--width", type=int, default=896)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--instruction-set", default="", help="plain, avx2 or avx512; the best one if not given")
    arguments = parser.parse_args()
    native.select(arguments.instruction_set)
    functions = passes(arguments.rows, arguments.columns, arguments.width)
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(arguments.rounds):
        for name, function in functions.items():
            times[name].append(milliseconds(function))
    print(f"{arguments.rows} x {arguments.columns} logits, width {arguments.width}, {native.features()}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}")  # fmt: skip
    print(f"{'ms':40}{'median':>9}{'min':>9}{'max':>9}")
    for name, values in times.items():
        print(f"{name:40}{statistics.median(values):9.1f}{min(values):9.1f}{max(values):9.1f}")


if __name__ == "__main__":
    main()

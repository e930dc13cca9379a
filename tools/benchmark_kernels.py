"""Time and memory of the fused kernels and their alternatives, in turn in one run, on random data.

    python tools/benchmark_kernels.py [--device cpu|cuda] [--shapes 2048x896x151936 ...] [--dtypes bfloat16 float32]
        [--rounds 5] [--budget-mb 320] [--only linear_oreal,naive] [--out DIR]

A shape is rows x hidden x vocabulary; V/8 stands for one of eight tensor-parallel ranks, without its communication.
Prints the tables; with --out writes results.json (a row per op, shape, dtype and provider) and benchmark.png. The
number to compare between machines is the ratio to the three bare matrix products measured in the same run.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from oreal_kernels import native
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "kernels/benchmarks"))
import head_providers  # noqa: E402
import loss_providers  # noqa: E402

SHAPES = {
    "cpu": ["2048x896x151936"],
    "cuda": ["16384x5120x152064", "16384x5120x19008", "16384x3584x152064", "16384x896x151936"],
}
SEQUENCES = (16, 14000)


def synchronize(device: str) -> None:
    """Wait for the GPU, if it is one."""
    if device == "cuda":
        torch.cuda.synchronize()


def milliseconds(function: Callable, device: str) -> tuple[float, object]:
    """Return the duration of a call and its result."""
    synchronize(device)
    start = time.perf_counter()
    result = function()
    synchronize(device)
    return (time.perf_counter() - start) * 1e3, result


def measure_once(forward: Callable, device: str) -> tuple[float, float]:
    """Return the milliseconds of forward and of backward."""
    first, result = milliseconds(forward, device)
    second, _ = milliseconds(result.backward, device)
    return first, second


def extra_bytes(forward: Callable, device: str) -> int | None:
    """Return the peak memory beyond that before the call; None where the system does not report it."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        measure_once(forward, device)
        return torch.cuda.max_memory_allocated() - before
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak of the resident size
        before = resident("VmRSS")
    except OSError:
        return None
    measure_once(forward, device)
    return max(0, resident("VmHWM") - before)  # memory freed meanwhile is not a gain


def resident(field: str) -> int:
    """Return a size from /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def quantiles(values: list[float]) -> dict[str, float]:
    """Return the 20th, 50th and 80th percentile."""
    ordered = sorted(values)

    def at(share: float) -> float:
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    return {"p20": at(0.2), "p50": statistics.median(ordered), "p80": at(0.8)}


def measure(
    op: str, case: str, dtype: str, providers: list, unit: Callable, arguments, progress: Progress
) -> list[dict]:
    """Return the rows of one table: every provider runs once per round, and so does the unit of the ratios."""
    device, times, units, memory = arguments.device, {name: [] for name, _ in providers}, [], {}
    task = progress.add_task(f"{op} {case} {dtype}", total=(arguments.rounds + 1) * (len(providers) + 1))
    for round_number in range(arguments.rounds + 1):  # the first warms up and measures memory
        for name, forward in providers:
            if round_number:
                times[name].append(measure_once(forward, device))
            else:
                measure_once(forward, device)
                memory[name] = extra_bytes(forward, device)
            progress.advance(task)
        unit_ms, _ = milliseconds(unit, device)
        units += [unit_ms] if round_number else []
        progress.advance(task)
    median_unit = statistics.median(units)
    rows = [{"provider": UNITS[op], "forward_ms": quantiles(units), "total_ms": quantiles(units), "ratio": 1.0}]
    for name, durations in times.items():
        total = [forward + backward for forward, backward in durations]
        rows.append(
            {
                "provider": name,
                "forward_ms": quantiles([forward for forward, _ in durations]),
                "backward_ms": quantiles([backward for _, backward in durations]),
                "total_ms": quantiles(total),
                "extra_peak_bytes": memory[name],
                "ratio": statistics.median(total) / median_unit,
            }
        )
    return [{"op": op, "shape": case, "dtype": dtype, "device": device, **row} for row in rows]


UNITS = {"head": "bare GEMMs", "loss": "copy of its bytes"}


def machine(device: str) -> dict[str, str]:
    """Return device, versions and command of this run."""
    name = torch.cuda.get_device_name() if device == "cuda" else processor()
    cpu = (
        f"{torch.get_num_threads()} threads, native library: {native.features() if native.available() else 'not built'}"
    )
    return {
        "device": name if device == "cuda" else f"{name}, {cpu}",
        "versions": f"torch {torch.__version__}, triton {triton.__version__}, Python {platform.python_version()}",
        "command": "python " + " ".join(sys.argv),
    }


def processor() -> str:
    """Return the CPU's model name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())


def print_tables(rows: list[dict], console: Console) -> None:
    """Print one table per operation, shape and dtype, in at most 80 columns."""
    for key in dict.fromkeys((row["op"], row["shape"], row["dtype"]) for row in rows):
        table = Table(title=" ".join(key))
        for column in (
            "provider",
            "forward\nms",
            "backward\nms",
            "both ms\n(p20-p80)",
            "extra\nMB",
            "to " + UNITS[key[0]].replace(" ", "\n", 1),
        ):
            table.add_column(column, justify="left" if column == "provider" else "right")
        for row in rows:
            if (row["op"], row["shape"], row["dtype"]) == key:
                table.add_row(*cells(row))
        console.print(table)


def cells(row: dict) -> list[str]:
    """Return the texts of a row of the table."""
    both, extra = row["total_ms"], row.get("extra_peak_bytes")
    return [
        row["provider"],
        f"{row['forward_ms']['p50']:.4g}",
        f"{row['backward_ms']['p50']:.4g}" if "backward_ms" in row else "",
        f"{both['p50']:.4g} ({both['p20']:.3g}-{both['p80']:.3g})",
        "" if extra is None else f"{extra / 1e6:.0f}",
        f"{row['ratio']:.2f}",
    ]


def plot(rows: list[dict], path: Path, title: str) -> None:
    """Draw time (logarithmic) and memory of each table; no memory panel where none was measured."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    keys = list(dict.fromkeys((row["op"], row["shape"], row["dtype"]) for row in rows))
    figure, axes = plt.subplots(len(keys), 2, figsize=(13, 3.2 * len(keys)), squeeze=False)
    for (time_axis, memory_axis), key in zip(axes, keys, strict=True):
        own = [row for row in rows if (row["op"], row["shape"], row["dtype"]) == key][::-1]
        names, both = [row["provider"] for row in own], [row["total_ms"] for row in own]
        middle = [each["p50"] for each in both]
        spread = [[each["p50"] - each["p20"] for each in both], [each["p80"] - each["p50"] for each in both]]
        colours = ["tab:orange" if name.startswith(("linear_", "token_")) else "tab:gray" for name in names]
        time_axis.barh(names, middle, xerr=spread, color=colours)
        time_axis.set_xscale("log")
        time_axis.set_xlabel("ms, forward and backward (p50, p20 to p80)")
        time_axis.set_title(" ".join(key))
        if not any(row.get("extra_peak_bytes") for row in own):
            memory_axis.remove()
            continue
        memory_axis.barh(names, [(row.get("extra_peak_bytes") or 0) / 1e6 for row in own], color=colours)
        memory_axis.set_xlabel("MB beyond inputs and main_grad")
        memory_axis.set_yticklabels([])
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> int:
    """Measure, print, and with --out write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", nargs="*", metavar="NxHxV")
    parser.add_argument("--dtypes", nargs="+", choices=("bfloat16", "float32"), default=["bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--budget-mb", type=int, help="logits in the modes of oreal_kernels; default 320 on cpu, 1280 on cuda"
    )
    parser.add_argument(
        "--sequences",
        default="x".join(map(str, SEQUENCES)),
        metavar="BxT",
        help="sequences and tokens of each, for the loss",
    )
    parser.add_argument("--only", default="", help="providers whose names contain one of these words")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    budget = (arguments.budget_mb or (1280 if arguments.device == "cuda" else 320)) * 10**6
    rows: list[dict] = []
    with Progress(console=Console(stderr=True)) as progress:
        for dtype in arguments.dtypes:
            for shape in SHAPES[arguments.device] if arguments.shapes is None else arguments.shapes:
                case = head_providers.HeadCase(
                    *map(int, shape.split("x")), getattr(torch, dtype), arguments.device, budget
                )
                head = head_providers.HeadProviders(case)
                providers = list(head.providers(arguments.only))
                rows += measure("head", case.shape, dtype, providers, head.bare_products(), arguments, progress)
                del head, providers
        loss = loss_providers.LossProviders(*map(int, arguments.sequences.split("x")), arguments.device)
        providers = list(loss.providers(arguments.only))
        if providers:
            rows += measure("loss", loss.shape, "float32", providers, loss.bare_copy(), arguments, progress)
    about = machine(arguments.device)
    console = Console(width=min(80, Console().width))
    print_tables(rows, console)
    console.print("\n".join(f"{key}: {value}" for key, value in about.items()), highlight=False)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "results.json").write_text(json.dumps({**about, "rows": rows}, indent=1))
        plot(rows, arguments.out / "benchmark.png", f"{about['device']}; {about['versions']}")
        console.print(f"written: {arguments.out}/results.json and benchmark.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())

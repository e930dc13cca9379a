"""Comparison of two sets of metrics, number by number."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from rich.console import Console

from oreal_megatron.observe.tables import add_columns, simple_table
from oreal_megatron.protocols import Metrics


@dataclasses.dataclass(frozen=True)
class MetricPair:
    """One metric of a dumped step, and of the step computed again."""

    name: str
    before: float
    now: float
    difference: float  # relative
    same: bool


def compare_metrics(before: Metrics, now: Metrics, tolerance: float) -> list[MetricPair]:
    """Compare all metrics that were computed again. Metrics `given/...` are differences themselves and should be 0."""
    pairs = []
    for name, value in now.items():
        old = before.get(name, 0.0 if name.startswith("given/") else math.nan)
        difference = value if name.startswith("given/") else relative_difference(old, value)
        pairs.append(MetricPair(name, old, value, difference, difference <= tolerance))
    return pairs


def relative_difference(first: float, second: float) -> float:
    """Return the relative difference; 0 for two nans and for equal infinities."""
    if first == second or (math.isnan(first) and math.isnan(second)):
        return 0.0
    difference = abs(first - second) / max(abs(first), abs(second))
    return difference if math.isfinite(difference) else math.inf


def print_comparison(pairs: Sequence[MetricPair], title: str) -> None:
    """Print the table and one line with the result."""
    table = simple_table(title)
    add_columns(table, "", "dumped", "computed again", "difference")
    for pair in pairs:
        difference = f"{pair.difference:.2g}" if pair.difference else "0"
        table.add_row(pair.name, f"{pair.before:.9g}", f"{pair.now:.9g}", difference)
    console = Console()
    console.print(table)
    largest = max(pairs, key=lambda pair: pair.difference)
    result = "reproduced bit for bit"
    if largest.difference:
        verdict = "reproduced" if largest.same else "not reproduced"
        result = f"{verdict}: the largest relative difference is {largest.difference:.3g}, in {largest.name}"
    if any(pair.difference and pair.name.endswith("/updates") for pair in pairs):
        missing = "the weights are not those of the step: dumps of some steps since the checkpoint are missing"
        console.print(missing, highlight=False)
    console.print(result, highlight=False)

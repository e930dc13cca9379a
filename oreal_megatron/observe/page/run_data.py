"""Contents of a run folder for the page: the logs, and counts over the rollouts of some steps."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oreal_megatron.observe.page.charts import Point
from oreal_megatron.observe.rows import Row, read_rows
from oreal_megatron.observe.run_report import RunRecord

COUNTED_STEPS = 24  # of a run, whose rollouts are read for counts
BINS = 10


@dataclass(frozen=True)
class StepCounts:
    """Counts over the rollouts of one step."""

    step: int
    methods: Counter[str]  # of "method, outcome"
    pass_rates: list[int]  # prompts with a pass rate in each tenth


@dataclass(frozen=True)
class RunData:
    """Contents of one run folder."""

    name: str  # as it is shown
    path: Path
    record: RunRecord
    calibration: list[Row]
    counts: list[StepCounts]

    def points(self, metric: str) -> list[Point]:
        """Return a metric of the steps that have it."""
        return [(row["step"], row[metric]) for row in self.record.metrics if is_number(row.get(metric))]

    def evaluation(self, key: str) -> list[Point]:
        """Return a figure of the evaluations on held-out problems."""
        return [(row["step"], row[key]) for row in self.record.evaluations if is_number(row.get(key))]

    def mean_of_last(self, metric: str, steps: int = 10) -> float | None:
        """Return the mean of a metric over the last steps that have it."""
        values = [value for _, value in self.points(metric)[-steps:]]
        return sum(values) / len(values) if values else None


def is_number(value: object) -> bool:
    """Return whether a value of a log is a number (nan and infinities included)."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def read(record: RunRecord, name: str) -> RunData:
    """Read the rest of a run folder."""
    path = Path(record.name)
    counts = [count_step(step, rows_by_prompt(path, step)) for step in spread(rollout_steps(path), COUNTED_STEPS)]
    return RunData(name, path, record, read_rows(path / "calibration.jsonl"), counts)


def short_names(paths: Sequence[Path]) -> list[str]:
    """Return names for runs: their folders without the part that all share."""
    parts = [path.resolve().parts for path in paths]
    if len(parts) == 1:
        return ["/".join(parts[0][-2:])]
    shared = next((n for n, names in enumerate(zip(*parts, strict=False)) if len(set(names)) > 1), 0)
    return ["/".join(own[shared:]) or own[-1] for own in parts]


def rollout_steps(run: Path) -> list[int]:
    """Return the steps whose rollouts are in the run folder."""
    names = (re.fullmatch(r"step_(\d+)", file.stem) for file in (run / "rollouts").glob("step_*.jsonl"))
    return sorted(int(name[1]) for name in names if name)


def spread(steps: Sequence[int], most: int) -> list[int]:
    """Return at most so many of the steps, evenly spread, the first and the last among them."""
    if len(steps) <= most:
        return list(steps)
    if most < 2:
        return list(steps[-most:]) if most else []
    return [steps[round(number * (len(steps) - 1) / (most - 1))] for number in range(most)]


def rows_by_prompt(run: Path, step: int) -> dict[int, list[dict[str, Any]]]:
    """Return the rollouts of a step by the slot of their prompt."""
    prompts: dict[int, list[dict[str, Any]]] = {}
    for row in _rows(run / "rollouts" / f"step_{step:06d}.jsonl"):
        prompts.setdefault(row["slot"], []).append(row)
    return dict(sorted(prompts.items()))


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def count_step(step: int, prompts: dict[int, list[dict[str, Any]]]) -> StepCounts:
    """Count the methods of verdicts, and the prompts by their pass rate."""
    methods: Counter[str] = Counter()
    pass_rates = [0] * BINS
    for rows in prompts.values():
        methods.update(f"{row['method']}, {row['verdict']}" for row in rows)
        outcomes = [row["verdict"] for row in rows if row["verdict"] != "unknown"]
        if outcomes:
            share = outcomes.count("correct") / len(outcomes)
            pass_rates[min(int(share * BINS), BINS - 1)] += 1
    return StepCounts(step, methods, pass_rates)

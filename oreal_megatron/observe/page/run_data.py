"""Contents of a run folder for the page: the logs, and counts over the rollouts of some steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oreal_megatron.config import ConfigError
from oreal_megatron.observe.page.charts import Point
from oreal_megatron.observe.rows import Row, read_rows
from oreal_megatron.observe.run_report import RunRecord
from oreal_megatron.runtime import rollout_files

COUNTED_STEPS = 24  # of a run, whose rollouts are read for counts
BINS = 10
ROLLOUT_KEYS = ("slot", "index", "question", "gold_answer", "response", "tokens", "finished", "verdict", "method")


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


def rollout_steps(run: Path) -> list[int]:
    """Return the steps whose rollouts are in the run folder."""
    return list(rollout_files.complete_steps(run))


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
    for location, row in rollout_files.read(rollout_files.complete_steps(run)[step]):
        if missing := [key for key in ROLLOUT_KEYS if key not in row]:
            raise ConfigError(f"{location} has no {', '.join(missing)}; {rollout_files.LEAVE_OUT}")
        prompts.setdefault(row["slot"], []).append(row)
    return dict(sorted(prompts.items()))


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

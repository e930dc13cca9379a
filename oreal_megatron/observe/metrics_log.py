"""Metrics of a run: metrics.jsonl, evaluations.jsonl, calibration.jsonl, and copies for the trackers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

from oreal_megatron.algo.reward_diagnostics import CalibrationBins
from oreal_megatron.observe.rows import append_row, read_rows, write_rows
from oreal_megatron.observe.run_folder import saved_model
from oreal_megatron.observe.trackers import Trackers
from oreal_megatron.protocols import Metrics
from oreal_megatron.runtime import distributed


class MetricsLog:
    """Writer of the metrics of steps and evaluations. The first rank writes; the others take part in collectives.

    Opening the log drops the rows that an interrupted run wrote at or after `first_step`, which is run again.
    """

    def __init__(self, run: Path, first_step: int = 0, trackers: Trackers | None = None):
        self.run, self.writes = run, distributed.rank() == 0
        self.metrics, self.evaluations = run / "metrics.jsonl", run / "evaluations.jsonl"
        self.calibration = run / "calibration.jsonl"
        if self.writes:
            run.mkdir(parents=True, exist_ok=True)
            _truncate(self.metrics, first_step - 1)
            _truncate(self.calibration, first_step - 1)
            _truncate(self.evaluations, first_step)  # the policy before `first_step` has been evaluated already
        self.trackers = trackers

    def log_step(self, step: int, metrics: Metrics) -> None:
        """Write the metrics of one step. Not collective."""
        if self.writes:
            append_row(self.metrics, {"step": step, **metrics})
            self._track(step, metrics)

    def log_calibration(self, step: int, bins: CalibrationBins) -> None:
        """Write the calibration bins of one step. Not collective."""
        if self.writes:
            append_row(self.calibration, {"step": step, **dataclasses.asdict(bins)})

    def log_evaluation(self, step: int, result: Metrics) -> None:
        """Write the result on held-out problems after `step` steps. Not collective."""
        if self.writes:
            append_row(self.evaluations, {"step": step, **result})
            self._track(step, {f"evaluation/{name}": value for name, value in result.items()})

    def last_evaluation(self, figure: str) -> float | None:
        """Return a figure of the last evaluation, None before the first. Not collective."""
        values = [row[figure] for row in read_rows(self.evaluations) if figure in row]
        return values[-1] if values else None

    def is_evaluated(self, step: int) -> bool:
        """Return whether there is an evaluation after `step` steps. Collective."""
        rows = read_rows(self.evaluations) if self.writes else []
        return bool(distributed.all_gather_object(any(row["step"] == step for row in rows))[0])

    def value_if_best(self, step: int, figure: str, model: Path) -> float | None:
        """Return a figure after `step` steps if it beats the first evaluation and that of the saved model. Collective.

        `model`: folder that the best model so far was saved into.
        """
        value = self._value_if_best(step, figure, model) if self.writes else None
        return distributed.all_gather_object(value)[0]

    def _value_if_best(self, step: int, figure: str, model: Path) -> float | None:
        values = {row["step"]: row[figure] for row in read_rows(self.evaluations) if figure in row}
        if step not in values or not step:
            return None
        first = values.get(0, -math.inf)
        record = saved_model(model)
        if figure in record:
            to_beat = max(record[figure], first)
        else:  # a folder of 0.1.0 has no record, and an earlier start may have compared another figure
            earlier = [value for other, value in values.items() if other < step]
            to_beat = max(earlier, default=first) if model.is_dir() else first
        return values[step] if values[step] > to_beat else None

    def evaluations_since_best(self, figure: str) -> int:
        """Return the evaluations after the first one with the highest value of a figure. Collective."""
        values = [row[figure] for row in read_rows(self.evaluations)] if self.writes else []
        behind = len(values) - 1 - values.index(max(values)) if values else 0
        return int(distributed.all_gather_object(behind)[0])

    def first_and_best(self, figure: str) -> tuple[float, float, int]:
        """Return a figure of the first and of the best evaluation, and the step of the latter. Collective."""
        rows = read_rows(self.evaluations) if self.writes else []
        best = max(rows, key=lambda row: row[figure], default=None)
        values = (rows[0][figure], best[figure], best["step"]) if best else (math.nan, math.nan, 0)
        first, highest, step = distributed.all_gather_object(values)[0]
        return first, highest, step

    def _track(self, step: int, values: Mapping[str, float]) -> None:
        if self.trackers:
            self.trackers.add(step, values)


def _truncate(file: Path, last_step: int) -> None:
    """Drop the rows after `last_step`; do nothing if there is no such file."""
    if file.is_file():
        write_rows(file, [row for row in read_rows(file) if row["step"] <= last_step])

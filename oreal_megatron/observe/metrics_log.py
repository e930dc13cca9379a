"""Metrics of a run: metrics.jsonl, evaluations.jsonl, calibration.jsonl and TensorBoard events."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from oreal_megatron.algo.reward_diagnostics import CalibrationBins
from oreal_megatron.observe.rows import append_row, read_rows, write_rows
from oreal_megatron.protocols import Metrics
from oreal_megatron.runtime import distributed

log = logging.getLogger(__name__)


class MetricsLog:
    """Writer of the metrics of steps and evaluations. The first rank writes; the others take part in collectives.

    Opening the log drops the rows that an interrupted run wrote at or after `first_step`, which is run again.
    """

    def __init__(self, run: Path, first_step: int = 0):
        self.run, self.writes = run, distributed.rank() == 0
        self.metrics, self.evaluations = run / "metrics.jsonl", run / "evaluations.jsonl"
        self.calibration = run / "calibration.jsonl"
        if self.writes:
            run.mkdir(parents=True, exist_ok=True)
            _truncate(self.metrics, first_step - 1)
            _truncate(self.calibration, first_step - 1)
            _truncate(self.evaluations, first_step)  # the policy before `first_step` has been evaluated already
            self.events = SummaryWriter(str(run / "tensorboard"), purge_step=first_step)

    def log_step(self, step: int, metrics: Metrics) -> None:
        """Write the metrics of one step. Not collective."""
        if self.writes:
            append_row(self.metrics, {"step": step, **metrics})
            self._add_events(step, {"step": step, **metrics})

    def log_calibration(self, step: int, bins: CalibrationBins) -> None:
        """Write the calibration bins of one step. Not collective."""
        if self.writes:
            append_row(self.calibration, {"step": step, **dataclasses.asdict(bins)})

    def log_evaluation(self, step: int, result: Metrics) -> None:
        """Write the held-out accuracy of the policy after `step` steps. Not collective."""
        if self.writes:
            append_row(self.evaluations, {"step": step, **result})
            self._add_events(step, {f"evaluation/{name}": value for name, value in result.items()})

    def is_evaluated(self, step: int) -> bool:
        """Return whether the policy after `step` steps has been evaluated. Collective."""
        rows = read_rows(self.evaluations) if self.writes else []
        return bool(distributed.all_gather_object(any(row["step"] == step for row in rows))[0])

    def is_best(self, step: int) -> bool:
        """Return whether the policy after `step` steps beats every earlier evaluation. Collective."""
        rows = read_rows(self.evaluations) if self.writes else []
        accuracies = [row["accuracy"] for row in rows if row["step"] == step]
        best = all(row["accuracy"] < accuracies[-1] for row in rows if row["step"] < step)
        return bool(distributed.all_gather_object(best)[0])

    def _add_events(self, step: int, values: Mapping[str, float]) -> None:
        """Add TensorBoard scalars. They are copies: if the disk is full, they are lost and the run continues."""
        try:
            for name, value in values.items():
                self.events.add_scalar(name, value, step)
        except OSError as error:
            log.warning("TensorBoard events of step %d are lost (%s); metrics.jsonl has the values", step, error)
            self.events = SummaryWriter(str(self.run / "tensorboard"))


def _truncate(file: Path, last_step: int) -> None:
    """Drop the rows after `last_step`; do nothing if there is no such file."""
    if file.is_file():
        write_rows(file, [row for row in read_rows(file) if row["step"] <= last_step])

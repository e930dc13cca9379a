"""Functions of the user that watch a run: `record.metric` and `record.after_step`. A failure never stops the run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from oreal_megatron.config import RecordConfig
from oreal_megatron.config.user_functions import read_function
from oreal_megatron.protocols import Metrics
from oreal_megatron.records import Rollout, Verdict

log = logging.getLogger(__name__)
PREFIX = "own/"


class UserHooks:
    """Both functions, read when the run starts; each failure is logged once."""

    def __init__(self, config: RecordConfig):
        self.metric = _read(config.metric, "record.metric", ("rollouts", "verdicts"))
        self.after_step = _read(config.after_step, "record.after_step", ("step", "metrics", "run"))
        self.reported: set[str] = set()

    def metrics(self, rollouts: Sequence[Sequence[Rollout]], verdicts: Sequence[Sequence[Verdict]]) -> Metrics:
        """Return the user's metrics of a step under the prefix `own/`; values that are not numbers are left out."""
        returned = self._call("record.metric", self.metric, rollouts, verdicts) or {}
        if not isinstance(returned, dict):
            self._report("record.metric", f"it returned {type(returned).__name__}; expected a dictionary of numbers")
            return {}
        metrics: Metrics = {}
        for name, value in returned.items():
            try:
                metrics[f"{PREFIX}{name}"] = float(value)
            except (TypeError, ValueError):
                self._report("record.metric", f"{name} is {value!r:.100}; expected a number")
        return metrics

    def step_done(self, step: int, metrics: Metrics, run: str) -> None:
        """Call the user's function after a step."""
        self._call("record.after_step", self.after_step, step, dict(metrics), run)

    def _call(self, key: str, function: Callable[..., Any] | None, *arguments: object) -> Any:
        if function is None:
            return None
        try:
            return function(*arguments)
        except Exception as error:  # the user's function may do anything
            self._report(key, f"{type(error).__name__}: {error}")
            return None

    def _report(self, key: str, text: str) -> None:
        if text not in self.reported:
            self.reported.add(text)
            log.warning("%s failed, and the run continues: %s", key, text)


def _read(name: str, key: str, arguments: tuple[str, ...]) -> Callable[..., Any] | None:
    return read_function(name, key, arguments) if name else None

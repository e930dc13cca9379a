"""Skip a step whose loss or gradient is not finite, or whose gradient norm is a spike.

A skipped step changes nothing of its model: no weight, no moment, no count of updates. All ranks decide on the same
numbers, so they take the same decision.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from oreal_megatron.config import GuardConfig, RunStopped

MODELS = ("reward_model", "policy")  # in the order of a step: where the first skips, so does the second


@dataclass(frozen=True, slots=True)
class GuardState:
    """History of one model's steps. Its checkpoint carries it, so that a resumed run takes the same decisions."""

    skipped: int = 0  # steps skipped in the whole run
    consecutive_skips: int = 0  # steps skipped since the last one taken
    gradient_norms: tuple[float, ...] = ()  # of the newest steps taken, oldest first; at most guard.spike_window

    def after_step(self, gradient_norm: float, window: int) -> GuardState:
        """Return the history after a step that was taken."""
        norms = (*self.gradient_norms, gradient_norm)[-window:]
        return replace(self, consecutive_skips=0, gradient_norms=norms)

    def after_skip(self) -> GuardState:
        """Return the history after a step that was skipped."""
        return replace(self, skipped=self.skipped + 1, consecutive_skips=self.consecutive_skips + 1)

    def metrics(self) -> dict[str, float]:
        """Return the two counts, for the step's metrics."""
        return {"skipped": self.skipped, "consecutive_skips": self.consecutive_skips}

    def to_checkpoint(self) -> dict[str, Any]:
        """Return the history as it is stored in a checkpoint."""
        return {"skipped": self.skipped, "in_a_row": self.consecutive_skips, "norms": self.gradient_norms}

    @classmethod
    def from_checkpoint(cls, stored: Mapping[str, Any]) -> GuardState:
        """Read the history from a checkpoint."""
        return cls(stored["skipped"], stored["in_a_row"], tuple(stored["norms"]))


@dataclass(frozen=True, slots=True)
class GuardDecision:
    """Decision on one step of one model."""

    skip: bool
    norm_limit: float  # gradient norm above which the step is a spike; infinite: none is
    state: GuardState  # history after this step


def decide(state: GuardState, metrics: Mapping[str, float], config: GuardConfig) -> GuardDecision:
    """Decide whether to take the step with these metrics, `gradient_norm` among them."""
    limit = norm_limit(state, config)
    norm = metrics["gradient_norm"]
    if not all(map(math.isfinite, metrics.values())) or norm > limit:
        return GuardDecision(True, limit, state.after_skip())
    return GuardDecision(False, limit, state.after_step(norm, config.spike_window))


def norm_limit(state: GuardState, config: GuardConfig) -> float:
    """Return spike_factor times the median norm of the window; infinite without a factor or with a window not full."""
    if not config.spike_factor or len(state.gradient_norms) < config.spike_window:
        return math.inf
    return config.spike_factor * statistics.median(state.gradient_norms)


def skipped_models(metrics: Mapping[str, float]) -> list[str]:
    """Return the models that skipped this step."""
    return [model for model in MODELS if metrics.get(f"{model}/consecutive_skips")]


def skip_reason(metrics: Mapping[str, float]) -> str:
    """Return the values that are not finite and the gradient norms above their limit, as text."""
    reasons = [f"{name} is {value}" for name, value in metrics.items() if not math.isfinite(value)]
    for model in MODELS:
        norm, limit = metrics.get(f"{model}/gradient_norm", 0.0), metrics.get(f"{model}/gradient_norm_limit", math.inf)
        if norm > limit:
            reasons.append(f"{model}/gradient_norm is {norm:.4g}, above its limit of {limit:.4g}")
    return ", ".join(reasons)


def check(metrics: Mapping[str, float], config: GuardConfig, step: int) -> None:
    """Raise RunStopped where a model's weights are not finite or it has skipped too many steps in a row."""
    for model in MODELS:
        subject = f"step {step}: the {model.replace('_', ' ')}"
        if not math.isfinite(metrics.get(f"{model}/largest_weight", 0.0)):
            raise RunStopped(
                f"{subject} has weights that are not finite ({skip_reason(metrics)}). They were neither saved nor sent "
                "to the engine; resume from the last checkpoint. If this step fails again, the machine is not the "
                "cause: inspect the step with `oreal replay`, lower the learning rate or clip_grad"
            )
        if metrics.get(f"{model}/consecutive_skips", 0) >= config.max_consecutive_skips:
            raise RunStopped(
                f"{subject} has skipped {config.max_consecutive_skips} steps in a row, this one because "
                f"{skip_reason(metrics)}. Its weights are unchanged since the last step taken; inspect the step with "
                "`oreal replay`, then resume with another learning rate, other data or other settings of guard"
            )

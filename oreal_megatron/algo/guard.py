"""Steps that are refused: what they would be taken on is not a number, or its gradient is out of all proportion.

A refused step changes nothing of its model: no weight, no moment, no count of updates. Every rank decides on the same
numbers, so all decide alike.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from dataclasses import dataclass

from oreal_megatron.config import GuardConfig, RunStopped

MODELS = ("reward_model", "policy")  # the second refuses what the first did


@dataclass(frozen=True)
class GuardState:
    """What is remembered of one model's steps. Its checkpoint carries it, so that a resumed run decides alike."""

    skipped: int = 0  # in the whole run
    in_a_row: int = 0  # up to now
    norms: tuple[float, ...] = ()  # gradient norms of the newest steps taken, oldest first; at most guard.spike_window

    def taken(self, norm: float, window: int) -> GuardState:
        return dataclasses.replace(self, in_a_row=0, norms=(*self.norms, norm)[-window:])

    def refused(self) -> GuardState:
        return dataclasses.replace(self, skipped=self.skipped + 1, in_a_row=self.in_a_row + 1)

    def metrics(self) -> dict[str, float]:
        return {"skipped": self.skipped, "skipped_in_a_row": self.in_a_row}


def limit(past: GuardState, config: GuardConfig) -> float:
    """The gradient norm above which a step is a spike: none without a factor, nor until the window is full."""
    if not config.spike_factor or len(past.norms) < config.spike_window:
        return math.inf
    return config.spike_factor * statistics.median(past.norms)


def refuses(metrics: dict[str, float], norm_limit: float) -> bool:
    """Whether a step with these metrics, its `gradient_norm` among them, must not be taken."""
    return not all(map(math.isfinite, metrics.values())) or metrics["gradient_norm"] > norm_limit


def skipped(metrics: dict[str, float]) -> list[str]:
    """The models whose step was refused."""
    return [model for model in MODELS if metrics.get(f"{model}/skipped_in_a_row")]


def why(metrics: dict[str, float]) -> str:
    """What was wrong with a step of which something was refused."""
    bad = [f"{name} is {value}" for name, value in metrics.items() if not math.isfinite(value)]
    for model in MODELS:
        norm, most = metrics.get(f"{model}/gradient_norm", 0.0), metrics.get(f"{model}/gradient_norm_limit", math.inf)
        if norm > most:
            bad.append(f"{model}/gradient_norm is {norm:.4g}, more than {most:.4g}")
    return ", ".join(bad)


def check(metrics: dict[str, float], config: GuardConfig, step: int) -> None:
    """Stop the run where a model is broken, or has refused too many steps in a row."""
    for model in MODELS:
        who = f"step {step}: the {model.replace('_', ' ')}"
        if not math.isfinite(metrics.get(f"{model}/largest_weight", 0.0)):
            raise RunStopped(
                f"{who} holds weights that are not finite ({why(metrics)}). They were neither saved nor handed to the "
                "engine; resume from the last checkpoint. If it happens again at this step, it is not the machine: "
                "look at the step with `oreal replay`, lower the learning rate or clip harder"
            )
        if metrics.get(f"{model}/skipped_in_a_row", 0) >= config.max_consecutive_skips:
            raise RunStopped(
                f"{who} has refused {config.max_consecutive_skips} steps in a row, this one because {why(metrics)}. "
                "Its weights are as they were; look at the step with `oreal replay`, then resume with another learning "
                "rate, other data or other settings of guard"
            )

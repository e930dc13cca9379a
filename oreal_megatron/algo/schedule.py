"""Learning rates as pure functions of the number of updates taken: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from oreal_megatron.config import Config, OptimizerConfig


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """Return the rate of step `step` (from 0) out of `steps`: linear warm-up, then cosine from lr to min_lr."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(steps - config.warmup_steps - 1, 1)
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2


def policy_rate(update: int, config: Config) -> float:
    """Return the policy's rate at its update `update` (from 0).

    With policy_schedule="steps" the schedule begins with the run, as in the authors' code: after 10 frozen steps, a
    warm-up of 10 is over and the first update has the full rate. With "updates" it begins after the frozen steps.
    A step without an update of the policy after these (no samples, skipped by the guard) does not advance it.
    """
    first = config.frozen_steps if config.policy_schedule == "steps" else 0
    return learning_rate(first + update, config.policy_schedule_steps, config.optimizer)

"""Learning rate as a pure function of the update number: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from oreal_megatron.config import OptimizerConfig


def learning_rate(update: int, updates: int, config: OptimizerConfig) -> float:
    """Return the rate of update `update` (from 0) out of `updates`: linear warm-up, then cosine from lr to min_lr."""
    if update < config.warmup_steps:
        return config.lr * (update + 1) / config.warmup_steps
    progress = (update - config.warmup_steps) / max(updates - config.warmup_steps - 1, 1)
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2

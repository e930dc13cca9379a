"""Reward shaping: advantages over all K answers of a prompt, before any is dropped."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def leave_one_out(rewards: Sequence[float]) -> list[float]:
    """RLOO: each reward minus the mean of the others (paper, section 2.2).

    Raises ValueError with fewer than two rewards, for which there are no others.
    """
    count = len(rewards)
    if count < 2:
        raise ValueError(f"leave-one-out needs at least 2 answers per prompt, got {count}; raise rollouts_per_prompt")
    total = sum(rewards)
    return [reward - (total - reward) / (count - 1) for reward in rewards]


def group_normalised(rewards: Sequence[float]) -> list[float]:
    """GRPO: rewards minus their mean, over their sample standard deviation plus 1e-8 (as in the authors' code)."""
    if len(rewards) < 2:
        raise ValueError(f"group normalisation needs at least 2 answers per prompt, got {len(rewards)}")
    mean, deviation = statistics.fmean(rewards), statistics.stdev(rewards)
    return [(reward - mean) / (deviation + 1e-8) for reward in rewards]


KINDS = {"leave_one_out": leave_one_out, "group_normalised": group_normalised}

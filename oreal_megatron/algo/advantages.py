"""Advantages over all K rollouts of a prompt, before samples are selected."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def leave_one_out(rewards: Sequence[float]) -> list[float]:
    """Return RLOO advantages: each reward minus the mean of the others (arXiv 2502.06781, section 2.2).

    Raises ValueError for fewer than two rewards.
    """
    count = len(rewards)
    if count < 2:
        raise ValueError(f"leave-one-out needs at least 2 rollouts per prompt, got {count}; raise rollouts_per_prompt")
    total = sum(rewards)
    return [reward - (total - reward) / (count - 1) for reward in rewards]


def group_normalised(rewards: Sequence[float]) -> list[float]:
    """Return GRPO advantages: (reward - mean) / (sample standard deviation + 1e-8), as in the authors' code.

    Raises ValueError for fewer than two rewards.
    """
    if len(rewards) < 2:
        raise ValueError(f"group normalisation needs at least 2 rollouts per prompt, got {len(rewards)}")
    mean, deviation = statistics.fmean(rewards), statistics.stdev(rewards)
    return [(reward - mean) / (deviation + 1e-8) for reward in rewards]


KINDS = {"leave_one_out": leave_one_out, "group_normalised": group_normalised}

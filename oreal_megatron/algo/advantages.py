"""Advantages over all K rollouts of a prompt, before samples are selected."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def leave_one_out(rewards: Sequence[float]) -> list[float]:
    """Return RLOO advantages: each reward minus the mean of the others (arXiv 2502.06781, section 2.2).

    A single reward has no others to compare with: 0.
    """
    count = len(rewards)
    if count < 2:
        return [0.0] * count
    total = sum(rewards)
    return [own - (total - own) / (count - 1) for own in rewards]


def group_normalised(rewards: Sequence[float]) -> list[float]:
    """Return GRPO advantages: (reward - mean) / (sample standard deviation + 1e-8), as in the authors' code.

    A single reward has no spread: 0.
    """
    if len(rewards) < 2:
        return [0.0] * len(rewards)
    mean, deviation = statistics.fmean(rewards), statistics.stdev(rewards)
    return [(own - mean) / (deviation + 1e-8) for own in rewards]


def reward(rewards: Sequence[float]) -> list[float]:
    """Return the rewards themselves: REINFORCE without a baseline."""
    return list(rewards)


KINDS = {"leave_one_out": leave_one_out, "group_normalised": group_normalised, "reward": reward}

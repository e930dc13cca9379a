"""Advantages over all K rollouts of a prompt, before samples are selected."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Sequence

from oreal_megatron.config import RunStopped, SelectionConfig
from oreal_megatron.config.user_functions import read_function

# Rewards of a prompt's rollouts -> their advantages.
AdvantageRule = Callable[[Sequence[float]], list[float]]


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


def advantage_rule(config: SelectionConfig) -> AdvantageRule:
    """Return `selection.advantage_rule`, or that of `selection.advantage` without one.

    Raises ConfigError where `selection.advantage_rule` names no function of the rewards.
    """
    return _read_rule(config.advantage_rule) if config.advantage_rule else KINDS[config.advantage]


@functools.lru_cache(maxsize=8)  # a function is read once, not once a step
def _read_rule(name: str) -> AdvantageRule:
    rule = read_function(name, "selection.advantage_rule", ("rewards",))

    def checked_rule(rewards: Sequence[float]) -> list[float]:
        return _check_advantages(rule(list(rewards)), len(rewards), name)

    return checked_rule


def _check_advantages(returned: Sequence[float], count: int, rule: str) -> list[float]:
    """Return the advantages as numbers; raise RunStopped where there is not a finite one per reward."""
    try:
        advantages = [float(value) for value in returned]
    except (TypeError, ValueError):
        advantages = []
    if len(advantages) != count or not all(map(math.isfinite, advantages)):
        raise RunStopped(
            f"selection.advantage_rule {rule} returned {returned!r:.200}; expected {count} finite numbers, one of each "
            "reward"
        )
    return advantages

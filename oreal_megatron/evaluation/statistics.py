"""Statistics of several responses to each problem: pass@k, majority, confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def pass_at_k(responses: int, correct: int, k: int) -> float:
    """Return the chance that one of k responses drawn without replacement is correct (Chen et al. 2021, Eq. 1)."""
    if not 1 <= k <= responses:
        raise ValueError(f"pass@{k} cannot be estimated from {responses} responses; sample at least {k}")
    return 1.0 - math.comb(responses - correct, k) / math.comb(responses, k)


def majority_is_correct(extracted: Sequence[str | None], correct: Sequence[bool]) -> bool:
    """Return whether the most frequent answer is correct; a tie goes to the first given. None does not vote."""
    votes: dict[str, list[bool]] = {}
    for answer, is_correct in zip(extracted, correct, strict=True):
        if answer is not None:
            votes.setdefault("".join(answer.split()), []).append(is_correct)
    most_frequent: list[bool] = max(votes.values(), key=len, default=[])
    return any(most_frequent)


def bootstrap(scores: Sequence[float], seed: int, draws: int = 2000) -> tuple[float, float]:
    """Return the 95 % percentile interval of the mean over problems, resampled with replacement."""
    values = torch.tensor(scores, dtype=torch.float64)
    resampled = torch.randint(len(values), (draws, len(values)), generator=torch.Generator().manual_seed(seed))
    low, high = values[resampled].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def wilson_interval(successes: float, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Return the 95 % score interval of a proportion (Wilson 1927)."""
    rate = successes / trials
    centre = rate + z * z / (2 * trials)
    spread = z * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max((centre - spread) / scale, 0.0), min((centre + spread) / scale, 1.0)  # beyond by rounding only

"""Scores of several answers to each problem, and how far chance could move them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def pass_at_k(answers: int, right: int, k: int) -> float:
    """Chance that one of k answers drawn without replacement is right (Chen et al. 2021, Eq. 1, unbiased)."""
    if not 1 <= k <= answers:
        raise ValueError(f"pass@{k} cannot be estimated from {answers} answers; ask for at least {k}")
    return 1.0 - math.comb(answers - right, k) / math.comb(answers, k)


def majority_is_right(extracted: Sequence[str | None], right: Sequence[bool]) -> bool:
    """Whether the answer given most often is right; a tie goes to the one given first. None does not vote."""
    votes: dict[str, list[bool]] = {}
    for answer, correct in zip(extracted, right, strict=True):
        if answer is not None:
            votes.setdefault("".join(answer.split()), []).append(correct)
    return any(max(votes.values(), key=len)) if votes else False


def bootstrap(scores: Sequence[float], seed: int, draws: int = 2000) -> tuple[float, float]:
    """95 % percentile interval of the mean over problems, which are drawn with replacement."""
    values = torch.tensor(scores, dtype=torch.float64)
    picked = torch.randint(len(values), (draws, len(values)), generator=torch.Generator().manual_seed(seed))
    low, high = values[picked].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high

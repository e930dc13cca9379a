"""Diagnostics of the token-level reward model as a judge of rollouts: ROC AUC and calibration.

Accuracy hides what it has learnt where its beliefs are all on one side of a half; these do not. Scores are mean token
scores, logits of the belief that a rollout is correct.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from oreal_megatron.records import MicroBatch, ScoredRollout

BINS = 10  # of the belief, from 0 to 1


@dataclass(frozen=True)
class CalibrationBins:
    """Rollouts by the reward model's belief in them, and how many of each bin are correct."""

    counts: list[int]  # [BINS]
    correct: list[int]  # [BINS]


def scored_rollouts(score_T: Tensor, micro_batch: MicroBatch) -> list[ScoredRollout]:
    """Return the rollouts of a micro-batch with their mean token score; filler and empty responses are left out."""
    means = _mean_scores(score_T, micro_batch.action_offsets)
    rows = zip(
        micro_batch.rollouts.tolist(), micro_batch.reward.tolist(), micro_batch.action_offsets.diff().tolist(), means,
        strict=True,
    )  # fmt: skip
    return [
        ScoredRollout(slot, index, reward > 0, float(mean))
        for (slot, index), reward, length, mean in rows
        if reward and length
    ]


def _mean_scores(score_T: Tensor, action_offsets: Tensor) -> Tensor:
    """Return the mean [B] of each sequence's scores; 0 for an empty one."""
    before = torch.cat([score_T.new_zeros(1, dtype=torch.float64), score_T.detach().double().cumsum(0)])
    offsets = action_offsets.to(score_T.device)
    return before[offsets].diff() / offsets.diff().clamp(min=1)


def metrics(rollouts: Sequence[ScoredRollout]) -> dict[str, float]:
    """Return AUC over all rollouts, and within prompts; a figure that needs both outcomes is absent without them."""
    figures = {"reward_model/auc": auc(rollouts), "reward_model/correct_above_incorrect": auc_within_prompts(rollouts)}
    return {name: value for name, value in figures.items() if value is not None}


def auc(rollouts: Iterable[ScoredRollout]) -> float | None:
    """Return the chance that a correct rollout scores above an incorrect one, ties counted half (ROC AUC).

    None unless there are rollouts of both outcomes.
    """
    correct = incorrect = 0
    ordered_pairs = 0.0
    score = operator.attrgetter("score")
    for _, ties in itertools.groupby(sorted(rollouts, key=score), key=score):
        outcomes = [rollout.correct for rollout in ties]
        tied_correct, tied_incorrect = outcomes.count(True), outcomes.count(False)
        ordered_pairs += tied_correct * (incorrect + tied_incorrect / 2)
        correct, incorrect = correct + tied_correct, incorrect + tied_incorrect
    return ordered_pairs / (correct * incorrect) if correct and incorrect else None


def auc_within_prompts(rollouts: Iterable[ScoredRollout]) -> float | None:
    """Return the mean AUC over prompts with both outcomes; with one pair each: prompts whose correct rollout wins."""
    by_slot: dict[int, list[ScoredRollout]] = {}
    for rollout in rollouts:
        by_slot.setdefault(rollout.slot, []).append(rollout)
    values = [value for group in by_slot.values() if (value := auc(group)) is not None]
    return sum(values) / len(values) if values else None


def calibration(rollouts: Iterable[ScoredRollout]) -> CalibrationBins:
    """Return counts of rollouts by belief; the belief of bin i is from i / BINS to (i + 1) / BINS."""
    bins = CalibrationBins([0] * BINS, [0] * BINS)
    for rollout in rollouts:
        number = min(int(belief(rollout.score) * BINS), BINS - 1)
        bins.counts[number] += 1
        bins.correct[number] += rollout.correct
    return bins


def belief(score: float) -> float:
    """Return sigmoid(score) without overflow."""
    return 1 / (1 + math.exp(-score)) if score >= 0 else math.exp(score) / (1 + math.exp(score))

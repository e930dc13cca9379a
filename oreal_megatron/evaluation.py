"""Accuracy on held-out problems, with its uncertainty."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from oreal_megatron.config import Config, Sampling
from oreal_megatron.records import Outcome, Prompt, Rollout


def evaluate(
    prompts: Sequence[Prompt],
    engine: Any,
    verifier: Any,
    config: Config,
    sampling: Sampling | None = None,
    answered: Callable[[], None] = lambda: None,
) -> tuple[dict[str, float], list[float | None]]:
    """Mean accuracy over all answers (greedy, one each, unless told otherwise), and each problem's pass rate.

    In the accuracy an UNKNOWN verdict is not right, and is counted; a pass rate leaves it out (None when nothing is
    known). `answered` is called for every answer of this replica.
    """
    greedy = dataclasses.replace(
        config.sampling,
        answers_per_prompt=1,
        temperature=0.0,
        top_p=1.0,
        max_new_tokens=config.evaluation.max_new_tokens,
    )
    sampling = sampling or greedy

    def finished(rollout: Rollout) -> None:
        verifier.submit(rollout)
        answered()

    rollouts = engine.generate(prompts, sampling, (config.seed, -1), finished)
    outcomes = [[verdict.outcome for verdict in row] for row in verifier.verdicts(rollouts)]
    rates = [_pass_rate(row) for row in outcomes]
    answers = len(prompts) * sampling.answers_per_prompt
    correct = sum(row.count(Outcome.CORRECT) for row in outcomes)
    low, high = wilson_interval(correct, answers)
    unknown = sum(row.count(Outcome.UNKNOWN) for row in outcomes)
    result = {"accuracy": correct / answers, "low": low, "high": high, "answers": answers, "unknown": unknown}
    return result, rates


def _pass_rate(outcomes: Sequence[Outcome]) -> float | None:
    known = len(outcomes) - outcomes.count(Outcome.UNKNOWN)
    return outcomes.count(Outcome.CORRECT) / known if known else None


def wilson_interval(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """95 % score interval of a proportion (Wilson 1927)."""
    rate = successes / trials
    centre = rate + z * z / (2 * trials)
    spread = z * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return (centre - spread) / scale, (centre + spread) / scale

"""Accuracy on held-out problems, with its uncertainty."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from oreal_megatron.config import Config, SamplingConfig
from oreal_megatron.evaluation import statistics
from oreal_megatron.records import Outcome, Prompt, Rollout, Verdict


def evaluate(
    prompts: Sequence[Prompt],
    engine: Any,
    verifier: Any,
    config: Config,
) -> dict[str, float]:
    """Accuracy of one greedy answer to each problem. An UNKNOWN verdict is not right, and is counted."""
    _, verdicts = ask(prompts, engine, verifier, greedy(config), (config.seed, -1))
    outcomes = [verdict.outcome for row in verdicts for verdict in row]
    correct, answers = outcomes.count(Outcome.CORRECT), len(outcomes)
    low, high = wilson_interval(correct, answers)
    unknown = outcomes.count(Outcome.UNKNOWN)
    return {"accuracy": correct / answers, "low": low, "high": high, "answers": answers, "unknown": unknown}


def greedy(config: Config) -> SamplingConfig:
    """One answer, the most likely token each time."""
    longest = config.evaluation.max_new_tokens
    return dataclasses.replace(
        config.sampling, rollouts_per_prompt=1, temperature=0.0, top_p=1.0, max_new_tokens=longest
    )


def ask(
    prompts: Sequence[Prompt],
    engine: Any,
    verifier: Any,
    sampling: SamplingConfig,
    seed: tuple[int, int],
) -> tuple[list[list[Rollout]], list[list[Verdict]]]:
    """[P, K] answers and verdicts, on every rank."""
    rollouts = engine.generate(prompts, sampling, seed, verifier.submit)
    return rollouts, verifier.verdicts(rollouts)


def summary(rows: Sequence[dict[str, Any]], seed: int) -> dict[str, Any]:
    """Scores of a suite from its response lines (`problem` tells them apart), intervals drawn with `seed`.

    An UNKNOWN verdict is not right, and is counted. avg@k is the mean over all answers; its interval is of problems.
    """
    problems = _by_problem(rows)
    right = [[row["verdict"] == Outcome.CORRECT.value for row in mine] for mine in problems.values()]
    answers = min(map(len, right))
    shares = [sum(mine) / len(mine) for mine in right]
    low, high = statistics.bootstrap(shares, seed)
    if low == high:  # all problems alike, as when none is solved: drawing them again says nothing
        low, high = wilson_interval(sum(shares), len(shares))
    ks = [k for k in (1, 2, 4, 8, 16, 32, 64, 128) if k <= answers]
    extracted = [[row["extracted"] for row in mine] for mine in problems.values()]
    lengths = torch.tensor([row["tokens"] for row in rows], dtype=torch.float64)
    return {
        "problems": len(problems),
        "answers_per_problem": answers,
        "accuracy": sum(shares) / len(shares),
        "interval": [low, high],
        "pass_at": {str(k): _mean([statistics.pass_at_k(len(mine), sum(mine), k) for mine in right]) for k in ks},
        "majority": _mean([statistics.majority_is_right(*both) for both in zip(extracted, right, strict=True)]),
        "tokens": {"mean": lengths.mean().item(), "median": lengths.median().item(), "most": lengths.max().item()},
        "truncated": _mean([not row["finished"] for row in rows]),
        "methods": dict(Counter(row["method"] for row in rows).most_common()),
        "unknown": sum(row["verdict"] == Outcome.UNKNOWN.value for row in rows),
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def pass_rates(rows: Sequence[dict[str, Any]]) -> dict[int, float | None]:
    """Share of right answers to each problem among those with a known verdict; None where nothing is known."""
    rates = {}
    for problem, mine in _by_problem(rows).items():
        verdicts = [row["verdict"] for row in mine]
        known = len(verdicts) - verdicts.count(Outcome.UNKNOWN.value)
        rates[problem] = verdicts.count(Outcome.CORRECT.value) / known if known else None
    return rates


def _by_problem(rows: Sequence[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    problems: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        problems.setdefault(row["problem"], []).append(row)
    return problems


def wilson_interval(successes: float, trials: int, z: float = 1.96) -> tuple[float, float]:
    """95 % score interval of a proportion (Wilson 1927)."""
    rate = successes / trials
    centre = rate + z * z / (2 * trials)
    spread = z * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return (centre - spread) / scale, (centre + spread) / scale

"""Accuracy on held-out problems, with its uncertainty."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import TypedDict

import torch

from oreal_megatron.config import Config, SamplingConfig
from oreal_megatron.evaluation import statistics
from oreal_megatron.observe.rows import Row
from oreal_megatron.protocols import Metrics, RolloutEngine, Verifier
from oreal_megatron.records import Outcome, Prompt, Rollout, Verdict


class SuiteScores(TypedDict):
    """Scores of one suite in one mode, as in results.json."""

    problems: int
    skipped: int  # without room for an answer, or with a gold answer that cannot be read
    answers_per_problem: int
    accuracy: float
    interval: list[float]
    pass_at: dict[str, float]
    majority: float
    tokens: dict[str, float]
    truncated: float
    methods: dict[str, int]
    unknown: int


def evaluate(prompts: Sequence[Prompt], engine: RolloutEngine, verifier: Verifier, config: Config) -> Metrics:
    """Return the accuracy of one greedy response to each problem, and of `evaluation.samples` sampled ones. Collective.

    UNKNOWN counts as not correct. Each call samples with the same seeds, so that evaluations of a run compare.
    """
    modes = {"": greedy(config)}
    if config.evaluation.samples:
        temperature = config.evaluation.temperature or config.sampling.temperature
        modes["sampled_"] = dataclasses.replace(sampled(config, config.evaluation.samples), temperature=temperature)
    metrics: Metrics = {}
    for prefix, sampling in modes.items():
        _, verdicts = generate_and_grade(prompts, engine, verifier, sampling, (config.seed, -1))
        metrics |= {f"{prefix}{name}": value for name, value in _accuracy(verdicts, config.seed).items()}
    return metrics


def _accuracy(verdicts: Sequence[Sequence[Verdict]], seed: int) -> Metrics:
    """Return the share of correct responses with its 95 % interval over problems, and counts."""
    shares = [sum(verdict.outcome is Outcome.CORRECT for verdict in row) / len(row) for row in verdicts]
    outcomes = [verdict.outcome for row in verdicts for verdict in row]
    low, high = _interval(shares, seed) if len(outcomes) > len(shares) else _wilson(shares)
    unknown = outcomes.count(Outcome.UNKNOWN)
    return {
        "accuracy": sum(shares) / len(shares),
        "low": low,
        "high": high,
        "answers": len(outcomes),
        "unknown": unknown,
    }


def _interval(shares: Sequence[float], seed: int) -> tuple[float, float]:
    """Return the 95 % interval of a mean of shares over problems."""
    low, high = statistics.bootstrap(shares, seed)
    return (low, high) if low < high else _wilson(shares)  # all problems alike: resampling has no spread


def _wilson(shares: Sequence[float]) -> tuple[float, float]:
    return statistics.wilson_interval(sum(shares), len(shares))


def greedy(config: Config) -> SamplingConfig:
    """Return the settings of one response by the most likely token each time."""
    longest = config.evaluation.max_new_tokens
    return dataclasses.replace(
        config.sampling, rollouts_per_prompt=1, temperature=0.0, top_p=1.0, max_new_tokens=longest
    )


def sampled(config: Config, responses: int) -> SamplingConfig:
    """Return the settings of several sampled responses, as long as the evaluation allows."""
    longest = config.evaluation.max_new_tokens
    return dataclasses.replace(config.sampling, rollouts_per_prompt=responses, max_new_tokens=longest)


def generate_and_grade(
    prompts: Sequence[Prompt],
    engine: RolloutEngine,
    verifier: Verifier,
    sampling: SamplingConfig,
    seed: tuple[int, int],
) -> tuple[list[list[Rollout]], list[list[Verdict]]]:
    """Return [P, K] rollouts and verdicts on every rank. Collective."""
    rollouts = engine.generate(prompts, sampling, seed, verifier.submit)
    return rollouts, verifier.verdicts(rollouts)


def summarize(rows: Sequence[Row], seed: int, skipped: int = 0) -> SuiteScores:
    """Return the scores of a suite from its response lines; intervals are drawn with `seed`.

    UNKNOWN counts as not correct. avg@k is the mean over all responses; its interval is over problems.
    """
    rows_of_problem = _by_problem(rows)
    correct = [
        [row["verdict"] == Outcome.CORRECT.value for row in problem_rows] for problem_rows in rows_of_problem.values()
    ]
    responses = min(map(len, correct))
    shares = [sum(outcomes) / len(outcomes) for outcomes in correct]
    low, high = _interval(shares, seed) if responses > 1 else _wilson(shares)  # as during training
    powers = [2**exponent for exponent in range(responses.bit_length()) if 2**exponent < responses]
    extracted = [[row["extracted"] for row in problem_rows] for problem_rows in rows_of_problem.values()]
    lengths = torch.tensor([row["tokens"] for row in rows], dtype=torch.float64)
    return {
        "problems": len(rows_of_problem),
        "skipped": skipped,
        "answers_per_problem": responses,
        "accuracy": sum(shares) / len(shares),
        "interval": [low, high],
        "pass_at": {
            str(k): _mean([statistics.pass_at_k(len(outcomes), sum(outcomes), k) for outcomes in correct])
            for k in [*powers, responses]
        },
        "majority": _mean([statistics.majority_is_correct(*votes) for votes in zip(extracted, correct, strict=True)]),
        "tokens": {"mean": lengths.mean().item(), "median": lengths.median().item(), "most": lengths.max().item()},
        "truncated": _mean([not row["finished"] for row in rows]),
        "methods": dict(Counter(row["method"] for row in rows).most_common()),
        "unknown": sum(row["verdict"] == Outcome.UNKNOWN.value for row in rows),
    }


def pass_rates(rows: Sequence[Row]) -> dict[int, float | None]:
    """Return the share of correct responses with a known verdict per problem; None if no verdict is known."""
    rates = {}
    for problem, problem_rows in _by_problem(rows).items():
        verdicts = [row["verdict"] for row in problem_rows]
        known = len(verdicts) - verdicts.count(Outcome.UNKNOWN.value)
        rates[problem] = verdicts.count(Outcome.CORRECT.value) / known if known else None
    return rates


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _by_problem(rows: Sequence[Row]) -> dict[int, list[Row]]:
    problems: dict[int, list[Row]] = {}
    for row in rows:
        problems.setdefault(row["problem"], []).append(row)
    return problems

"""Metrics of a step's generation over a pool of prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from oreal_megatron.config import Config
from oreal_megatron.protocols import Metrics
from oreal_megatron.records import Rollout
from oreal_megatron.rollout import pool_schedule
from oreal_megatron.rollout.pool_schedule import PooledPrompt, PromptPool, StepEnd


def of_step(start: PromptPool, end: StepEnd, dropped: Sequence[PooledPrompt], version: int, config: Config) -> Metrics:
    """Return counts and shares of a step; `start`: the pool before its first round, `version`: that of its weights."""
    trained, discarded = _rollouts(end.trained), _rollouts(end.discarded)
    before = sum(len(rollout.tokens) for rollout in start.rollouts())
    everything = [*trained, *discarded, *end.pool.rollouts()]
    generated = sum(len(rollout.tokens) for rollout in everything) - before
    lags = [
        (version - written_by, tokens)
        for rollout in trained
        for written_by, tokens in rollout.versions or ((rollout.version, len(rollout.tokens)),)
    ]
    tokens, sampled = sum(count for _, count in lags), [*trained, *discarded]
    shares = {
        "rollout/discarded_token_share": (sum(len(rollout.tokens) for rollout in discarded), generated),
        "rollout/earlier_version_share": (sum(count for lag, count in lags if lag), tokens),
        "rollout/version_lag_mean": (sum(lag * count for lag, count in lags), tokens),
        "rollout/length_ratio": (_mean_length(trained), _mean_length(sampled) if trained else 0.0),
    }
    return {
        "rollout/pool_prompts": len(start.prompts),
        "rollout/carried_rollouts": sum(bool(rollout.tokens) for rollout in end.pool.rollouts()),
        "rollout/carried_tokens": sum(len(rollout.tokens) for rollout in end.pool.rollouts()),
        "rollout/generated_tokens": generated,
        "rollout/aborted": sum(pool_schedule.is_open(rollout, config) for rollout in discarded),
        "rollout/dropped_prompts": len(dropped),
        **{name: part / total for name, (part, total) in shares.items() if total},  # of nothing there is no share
        **({"rollout/version_lag_max": max(lag for lag, _ in lags)} if lags else {}),
    }


def _rollouts(prompts: Iterable[PooledPrompt]) -> list[Rollout]:
    return [rollout for prompt in prompts for rollout in prompt.rollouts]


def _mean_length(rollouts: Sequence[Rollout]) -> float:
    return sum(len(rollout.tokens) for rollout in rollouts) / max(len(rollouts), 1)

"""Rollouts that grow: from no token to a complete response, in one round or several. Imports no vllm."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from oreal_megatron.records import Prompt, Rollout
from oreal_megatron.runtime import distributed


def blank_rollouts(prompts: Sequence[Prompt], per_prompt: int) -> list[Rollout]:
    """Return the rollouts of all prompts before their first token, by slot, then index."""
    return [
        Rollout(prompt, slot, index, (), "", False)
        for slot, prompt in enumerate(prompts)
        for index in range(per_prompt)
    ]


def append(
    rollout: Rollout, tokens: tuple[int, ...], logprobs: tuple[float, ...] | None, finished: bool, version: int
) -> Rollout:
    """Return a rollout with further tokens of a version of the policy."""
    runs = rollout.versions or (((rollout.version, len(rollout.tokens)),) if rollout.tokens else ())
    if runs and runs[-1][0] == version:
        runs = (*runs[:-1], (version, runs[-1][1] + len(tokens)))
    else:
        runs = (*runs, (version, len(tokens)))
    joined = None if logprobs is None else (*(rollout.logprobs or ()), *logprobs)
    return dataclasses.replace(
        rollout,
        tokens=rollout.tokens + tokens,
        finished=finished,
        logprobs=joined,
        version=version,
        versions=runs if len(runs) > 1 else (),
    )


GrowthPart = tuple[tuple[int, int], tuple[int, ...], tuple[float, ...] | None, bool, str]
"""Key of a rollout, its new tokens and log-probs, whether it has finished, and its text."""


def new_parts(grown: Sequence[Rollout], rollouts: Sequence[Rollout]) -> list[GrowthPart]:
    """Return what a rank sends of its own rollouts, which were among `rollouts` before: only new tokens."""
    before = {rollout.key: len(rollout.tokens) for rollout in rollouts}
    return [
        (r.key, r.tokens[start:], r.logprobs and r.logprobs[start:], r.finished, r.text)
        for r in grown
        for start in [before[r.key]]
    ]


def gather_growth(grown: Sequence[Rollout], rollouts: Sequence[Rollout], version: int) -> list[Rollout]:
    """Return all `rollouts` as they have grown, on every rank, from the ranks' own. Collective."""
    parts = distributed.all_gather_object(new_parts(grown, rollouts))
    everything = {key: part for parts_of_rank in parts for key, *part in parts_of_rank}
    result = []
    for rollout in rollouts:
        tokens, logprobs, finished, text = everything[rollout.key]
        longer = append(rollout, tokens, logprobs, finished, version)
        result.append(dataclasses.replace(longer, text=text))
    return result

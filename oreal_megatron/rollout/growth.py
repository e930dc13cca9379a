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


def gather_growth(grown: Sequence[Rollout], rollouts: Sequence[Rollout], version: int) -> list[Rollout]:
    """Return all `rollouts` as they have grown, on every rank, from the ranks' own. Only new tokens travel."""
    before = {rollout.key: rollout for rollout in rollouts}
    parts = []
    for rollout in grown:
        start = len(before[rollout.key].tokens)
        logprobs = rollout.logprobs and rollout.logprobs[start:]
        parts.append((rollout.key, rollout.tokens[start:], logprobs, rollout.finished, rollout.text))
    everything = {key: part for parts_of_rank in distributed.all_gather_object(parts) for key, *part in parts_of_rank}
    result = []
    for rollout in rollouts:
        tokens, logprobs, finished, text = everything[rollout.key]
        longer = append(rollout, tokens, logprobs, finished, version)
        result.append(dataclasses.replace(longer, text=text))
    return result

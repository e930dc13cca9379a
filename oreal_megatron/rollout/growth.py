"""Rollouts that grow: from no token to a complete response, in one round or several. Imports no vllm."""

from __future__ import annotations

import dataclasses
import itertools
import zlib
from array import array
from collections.abc import Sequence
from typing import NamedTuple

from oreal_megatron.config import RunStopped
from oreal_megatron.records import Prompt, Rollout
from oreal_megatron.runtime import distributed, remote_values


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
    joined = None if logprobs is None else (rollout.logprobs or ()) + logprobs
    return dataclasses.replace(
        rollout,
        tokens=rollout.tokens + tokens,
        finished=finished,
        logprobs=joined,
        version=version,
        versions=runs if len(runs) > 1 else (),
    )


class Growth(NamedTuple):
    """State of a rollout after a round, as all ranks know it: all but tokens, log-probs and text."""

    key: tuple[int, int]  # slot and index
    tokens: int
    has_logprobs: bool
    finished: bool
    checksum: int  # of the tokens, to compare the ranks of a replica


def growth_of(rollout: Rollout) -> Growth:
    """Return the state of a rollout that this rank has."""
    checksum = zlib.crc32(array("q", rollout.tokens))
    return Growth(rollout.key, len(rollout.tokens), rollout.logprobs is not None, rollout.finished, checksum)


def gather_growth(grown: Sequence[Rollout], rollouts: Sequence[Rollout], version: int, replicas: int) -> list[Rollout]:
    """Return all `rollouts` as they have grown, on every rank; `grown`: those of this rank's replica. Collective.

    Those of other replicas have stand-ins for their values. Raises RunStopped, on all ranks, where ranks of a replica
    have different tokens.
    """
    own = {rollout.key: rollout for rollout in grown}
    shares: list[list[Growth]] = distributed.all_gather_object([growth_of(rollout) for rollout in grown])
    growths: dict[tuple[int, int], Growth] = {}
    for growth in itertools.chain.from_iterable(shares):
        if growths.setdefault(growth.key, growth) != growth:
            raise RunStopped(
                f"ranks of one engine replica generated different responses for rollout {growth.key} (slot, index), so "
                "they cannot be trusted. Nothing was trained on this step; resume the run, or set engine.tensor=1"
            )
    return [
        own.get(rollout.key) or append_remote(rollout, growths[rollout.key], version, replicas) for rollout in rollouts
    ]


def append_remote(rollout: Rollout, growth: Growth, version: int, replicas: int) -> Rollout:
    """Return a rollout of another replica as it has grown."""
    replica = rollout.replica(replicas)
    count = growth.tokens - len(rollout.tokens)
    tokens = remote_values.remote_tokens(rollout, replica, count)
    logprobs = remote_values.remote_logprobs(rollout, replica, count) if growth.has_logprobs else None
    longer = append(rollout, tokens, logprobs, growth.finished, version)
    return dataclasses.replace(longer, text=remote_values.remote_text(rollout, replica))

"""Exchange of samples and rollouts between the replicas that generated them and the ranks that need their values.

Every rank knows the same samples or rollouts, with values where its replica generated them (remote_values.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from oreal_megatron.records import Rollout, Sample
from oreal_megatron.runtime import distributed
from oreal_megatron.runtime.remote_values import RemoteValueRead, is_local

Transfers = list[list[list[int]]]
"""Numbers of what is sent, by sender, then by receiver."""


def fetch(samples: Sequence[Sample], numbers: Collection[int]) -> list[Sample]:
    """Return the samples with the values of those that this rank needs, given by their numbers. Collective.

    Tokens travel as int32, log-probs as float32, in two collectives.
    """
    own = {number for number, sample in enumerate(samples) if _can_read(sample)}
    transfers = _plan_transfers(own, numbers)
    result, rank = list(samples), distributed.rank()
    if not any(numbers for sender in transfers for numbers in sender):
        return result
    sent = [[samples[number] for number in numbers] for numbers in transfers[rank]]
    received = [[samples[number] for number in sender[rank]] for sender in transfers]
    tokens = _exchange(
        [[(*sample.prompt_tokens, *sample.response_tokens) for sample in part] for part in sent],
        [sum(map(len, part)) for part in received],
        torch.int32,
    )
    logprobs = _exchange(
        [[sample.engine_logprobs or () for sample in part] for part in sent],
        [sum(len(sample.engine_logprobs or ()) for sample in part) for part in received],
        torch.float32,
    )
    for number in (number for sender in transfers for number in sender[rank]):
        sample = samples[number]
        prompt, response = len(sample.prompt_tokens), len(sample.response_tokens)
        known = sample.engine_logprobs is not None
        result[number] = dataclasses.replace(
            sample,
            prompt_tokens=tuple(next(tokens) for _ in range(prompt)),
            response_tokens=tuple(next(tokens) for _ in range(response)),
            engine_logprobs=tuple(next(logprobs) for _ in range(response)) if known else None,
        )
    return result


def gather(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """Return the rollouts, with all values on the first rank. Collective."""
    own = {number for number, rollout in enumerate(rollouts) if is_local(rollout.tokens)}
    transfers = _plan_transfers(own, range(len(rollouts)) if distributed.rank() == 0 else ())
    sent = [(number, *_values(rollouts[number])) for number in transfers[distributed.rank()][0]]
    result = list(rollouts)
    for number, tokens, logprobs, text in (row for rows in distributed.gather_object(sent) for row in rows):
        result[number] = dataclasses.replace(
            rollouts[number],
            tokens=tuple(tokens.tolist()),
            logprobs=None if logprobs is None else tuple(logprobs.tolist()),
            text=text,
        )
    return result


def _can_read(sample: Sample) -> bool:
    """Return whether this rank has all values of a sample."""
    return all(map(is_local, (sample.prompt_tokens, sample.response_tokens, sample.engine_logprobs)))


def _values(rollout: Rollout) -> tuple[Tensor, Tensor | None, str]:
    """Return tokens, log-probs and text, without a loss."""
    logprobs = rollout.logprobs
    values = None if logprobs is None else torch.tensor(logprobs, dtype=torch.float64)
    return torch.tensor(rollout.tokens, dtype=torch.int32), values, rollout.text


def _plan_transfers(own: set[int], needed: Collection[int]) -> Transfers:
    """Return who sends what to whom, equal on all ranks: the first rank that has a number sends it. Collective.

    Other ranks of its replica receive it too, so that all ranks that train a sample have the same log-probs of it.
    Raises RemoteValueRead, on all ranks, for a number that none of them holds.
    """
    shares: list[tuple[set[int], set[int]]] = distributed.all_gather_object((own, set(needed)))
    sender_of: dict[int, int] = {}
    for rank, (own_of_rank, _) in enumerate(shares):
        for number in own_of_rank:
            sender_of.setdefault(number, rank)
    transfers: Transfers = [[[] for _ in shares] for _ in shares]
    for rank, (_, needed_of_rank) in enumerate(shares):
        for number in sorted(needed_of_rank):
            if number not in sender_of:
                raise RemoteValueRead(f"no rank has the values of rollout number {number}, which rank {rank} needs")
            if sender_of[number] != rank:
                transfers[sender_of[number]][rank].append(number)
    return transfers


def _exchange(sent: Sequence[Sequence[Sequence[float]]], counts: list[int], dtype: torch.dtype) -> Any:
    """Return an iterator over the values that this rank receives, by sender; `sent`: by receiver. Collective.

    `counts`: values from each sender.
    """
    flat = [value for part in sent for values in part for value in values]
    sizes = [sum(map(len, part)) for part in sent]
    received = torch.empty(sum(counts), dtype=dtype)
    dist.all_to_all_single(received, torch.tensor(flat, dtype=dtype), counts, sizes)
    return iter(received.tolist())

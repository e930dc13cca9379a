"""Exchange of samples and rollouts between the replicas that generated them and the ranks that need their values.

Every rank knows the same samples or rollouts, with values where its replica generated them (remote_values.py).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterable, Sequence
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
    transfers, rank = _plan_transfers(own, numbers), distributed.rank()
    if not any(itertools.chain(*transfers)):
        return list(samples)
    outgoing = [[samples[number] for number in to_receiver] for to_receiver in transfers[rank]]
    incoming = [[samples[number] for number in of_sender[rank]] for of_sender in transfers]
    tokens = _exchange(outgoing, incoming, lambda sample: (sample.prompt_tokens, sample.response_tokens), torch.int32)
    logprobs = _exchange(outgoing, incoming, lambda sample: (sample.engine_logprobs or (),), torch.float32)
    result = list(samples)
    received = itertools.chain(*(of_sender[rank] for of_sender in transfers))
    for number, tokens_of_sample, logprobs_of_sample in zip(received, tokens, logprobs, strict=True):
        sample = samples[number]
        prompt = len(sample.prompt_tokens)
        result[number] = dataclasses.replace(
            sample,
            prompt_tokens=tokens_of_sample[:prompt],
            response_tokens=tokens_of_sample[prompt:],
            engine_logprobs=None if sample.engine_logprobs is None else logprobs_of_sample,
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


def _exchange(
    outgoing: Sequence[Sequence[Sample]],
    incoming: Sequence[Sequence[Sample]],
    values: Callable[[Sample], tuple[Sequence[float], ...]],
    dtype: torch.dtype,
) -> list[tuple[Any, ...]]:
    """Return the values of each incoming sample, in their order. Collective.

    `outgoing`: by receiver; `incoming`: by sender, without values but with their lengths.
    """
    flat = [value for sample in itertools.chain(*outgoing) for part in values(sample) for value in part]
    sent, lengths = ([[_length(values(sample)) for sample in group] for group in side] for side in (outgoing, incoming))
    received = torch.empty(sum(map(sum, lengths)), dtype=dtype)
    received_counts, sent_counts = list(map(sum, lengths)), list(map(sum, sent))
    dist.all_to_all_single(received, torch.tensor(flat, dtype=dtype), received_counts, sent_counts)
    return [tuple(part.tolist()) for part in received.split(list(itertools.chain(*lengths)))]


def _length(parts: Iterable[Sequence[float]]) -> int:
    return sum(map(len, parts))

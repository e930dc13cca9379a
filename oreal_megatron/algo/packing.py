"""Packing of a step's samples into micro-batches, equally many on every data-parallel rank."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence

import torch

from oreal_megatron.algo.selection import counts
from oreal_megatron.records import Batch, MicroBatch, MiniBatch, PackingSpec, Sample

RolloutKey = tuple[int, int]  # slot and index


def batch(samples: Sequence[Sample], spec: PackingSpec, mini_batches: int = 1) -> Batch:
    """Pack this data-parallel rank's share of the samples; the counts are those of the whole step.

    With several mini-batches, each of them is dealt to the ranks and packed by itself, with counts of its own.
    """
    parts = split_prompts(samples, mini_batches)
    packed = [_pack(part, spec) for part in parts]
    sizes = [MiniBatch(len(own), counts(part)) for own, part in zip(packed, parts, strict=True)]
    micro_batches = tuple(itertools.chain.from_iterable(packed))
    return Batch(micro_batches, counts(samples), tuple(sizes) if len(sizes) > 1 else ())


def split_prompts(samples: Sequence[Sample], parts: int) -> list[list[Sample]]:
    """Return the samples in parts of nearly equally many prompts, in order; at most one part for each prompt."""
    prompts = list(dict.fromkeys(sample.rollout[0] for sample in samples))
    part_of = {slot: number * parts // len(prompts) for number, slot in enumerate(prompts)}
    split: dict[int, list[Sample]] = {0: []}  # the first prompt is in part 0
    for sample in samples:
        split.setdefault(part_of[sample.rollout[0]], []).append(sample)
    return [split[number] for number in sorted(split)]


def own_numbers(samples: Sequence[Sample], spec: PackingSpec, mini_batches: int = 1) -> list[int]:
    """Return the numbers, in the sequence of samples, of those that `batch` packs: it reads the values of no others."""
    parts = split_prompts(samples, mini_batches)
    own = {id(sample) for part in parts for sample in _deal_samples(part, spec.ranks, spec.even_tokens)[spec.rank]}
    return [number for number, sample in enumerate(samples) if id(sample) in own]


def _pack(samples: Sequence[Sample], spec: PackingSpec) -> list[MicroBatch]:
    """Return this rank's micro-batches of an update.

    Every rank packs the shares of all ranks, so all agree on the number of micro-batches without communication:
    different numbers deadlock Megatron's schedules. Ranks with fewer micro-batches get empty ones.
    """
    budget = max(spec.tokens_per_micro_batch - spec.tokens_per_micro_batch % spec.token_multiple, 1)
    groups_by_rank = [_fill_groups(share, budget) for share in _deal_samples(samples, spec.ranks, spec.even_tokens)]
    largest = max(1, *(len(groups) for groups in groups_by_rank))
    number = -(-largest // spec.micro_batch_multiple) * spec.micro_batch_multiple
    groups = groups_by_rank[spec.rank] + [[]] * (number - len(groups_by_rank[spec.rank]))
    return [micro_batch(group, spec.token_multiple) for group in groups]


def sums_by_rollout(values: Sequence[torch.Tensor], micro_batches: Sequence[MicroBatch]) -> dict[RolloutKey, float]:
    """Return the sum of values [T] of each sequence, by its rollout; {} before the last pipeline stage."""
    sums: dict[RolloutKey, float] = {}
    for values_T, packed in zip(values, micro_batches if values else (), strict=True):
        lengths = packed.action_offsets.diff().tolist()
        parts = [part.sum().item() for part in values_T.double().cpu().split(lengths)]
        sums |= dict(zip(map(tuple, packed.rollouts.tolist()), parts, strict=True))
    sums.pop((-1, -1), None)  # the padding of an empty micro-batch
    return sums


def cost(tokens: int, even_tokens: float) -> float:
    """Return the estimated work of one sequence, in tokens whose attention is free."""
    return tokens * (1 + tokens / even_tokens)


def _deal_samples(samples: Sequence[Sample], ranks: int, even_tokens: float) -> list[list[Sample]]:
    """Deal samples, longest first, each to the rank with the least work; every share is sorted by falling length."""
    shares: list[list[Sample]] = [[] for _ in range(ranks)]
    loads = [0.0] * ranks
    for sample in sorted(samples, key=len, reverse=True):
        lightest = loads.index(min(loads))
        shares[lightest].append(sample)
        loads[lightest] += cost(len(sample), even_tokens)
    return shares


def _fill_groups(samples: Sequence[Sample], budget: int) -> list[list[Sample]]:
    """Put samples, sorted by falling length, each into the fullest group it fits into (best fit).

    A sample longer than the budget gets a group of its own.
    """
    groups: list[list[Sample]] = []
    free: list[tuple[int, int]] = []  # tokens that still fit, number of the group; sorted
    for sample in samples:
        at = bisect.bisect_left(free, (len(sample), -1))
        if at == len(free):
            free.append((max(budget, len(sample)), len(groups)))
            groups.append([])
        tokens, number = free.pop(at)
        groups[number].append(sample)
        bisect.insort(free, (tokens - len(sample), number))
    return groups


def micro_batch(samples: Sequence[Sample], pad_to: int = 1) -> MicroBatch:
    """Lay samples end to end, with filler tokens up to a multiple of `pad_to`.

    Without samples: filler only, which adds zero to every loss.
    """
    lengths = [len(sample) for sample in samples]
    filler = -sum(lengths) % pad_to if samples else pad_to
    sequence_offsets = torch.tensor([0, *lengths, *([filler] if filler else [])]).cumsum(0).tolist()
    return MicroBatch(
        tokens=_ints([token for s in samples for token in (*s.prompt_tokens, *s.response_tokens)] + [0] * filler),
        positions=_ints([position for length in (*lengths, filler) for position in range(length)]),
        sequence_offsets=tuple(sequence_offsets),
        action_index=_ints(  # the last prompt token predicts the first action
            [
                first + len(s.prompt_tokens) - 1 + action
                for first, s in zip(sequence_offsets, samples, strict=False)
                for action in range(len(s.response_tokens))
            ]
        ),
        labels=_ints([token for s in samples for token in s.response_tokens]),
        action_offsets=torch.tensor([0, *([len(s.response_tokens) for s in samples] or [0])]).cumsum(0),
        reward=torch.tensor([sample.reward for sample in samples] or [0.0]),
        advantage=torch.tensor([sample.advantage for sample in samples] or [0.0]),
        engine_logprobs=torch.tensor(
            [value for s in samples for value in s.engine_logprobs or [math.nan] * len(s.response_tokens)]
        ),
        rollouts=torch.tensor([sample.rollout for sample in samples] or [(-1, -1)]),
        carried=torch.tensor(
            [token < s.carried for s in samples for token in range(len(s.response_tokens))], dtype=torch.bool
        ),
    )


def _ints(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.long)

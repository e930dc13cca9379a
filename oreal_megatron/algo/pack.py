"""Samples -> equal numbers of micro-batches on every data-parallel rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from oreal_megatron.algo.selection import counts
from oreal_megatron.records import Batch, MicroBatch, Sample


def batch(samples: Sequence[Sample], tokens_per_micro_batch: int, rank: int, ranks: int, multiple: int = 1) -> Batch:
    """The micro-batches of data-parallel rank `rank` of `ranks`, and the counts of the whole step.

    Every rank computes the cut of all ranks, so all agree on the number of micro-batches without communication:
    different numbers deadlock Megatron's schedules. Ranks that have fewer get empty micro-batches, and all get as
    many as make the number a multiple of `multiple`, which interleaved pipelines need.
    """
    cut = [_groups(share, tokens_per_micro_batch) for share in _deal(samples, ranks)]
    longest = max(1, *(len(groups) for groups in cut))
    number = -(-longest // multiple) * multiple
    mine = cut[rank] + [[]] * (number - len(cut[rank]))
    return Batch(tuple(micro_batch(group) for group in mine), counts(samples))


def _deal(samples: Sequence[Sample], ranks: int) -> list[list[Sample]]:
    """Longest first, each to the rank with the fewest tokens so far."""
    shares: list[list[Sample]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for sample in sorted(samples, key=len, reverse=True):
        lightest = loads.index(min(loads))
        shares[lightest].append(sample)
        loads[lightest] += len(sample)
    return shares


def _groups(samples: list[Sample], tokens_per_micro_batch: int) -> list[list[Sample]]:
    """Consecutive samples (sorted by length) whose padded size stays in the budget; a longer one stands alone."""
    groups: list[list[Sample]] = []
    for sample in samples:
        if groups and len(groups[-1][0]) * (len(groups[-1]) + 1) <= tokens_per_micro_batch:
            groups[-1].append(sample)
        else:
            groups.append([sample])
    return groups


def micro_batch(samples: Sequence[Sample]) -> MicroBatch:
    """Right-padded tensors of some samples; causal attention never looks right, so padding needs no mask.

    Without samples: one filler token with no action, which adds zero to every loss.
    """
    width = max((len(sample) for sample in samples), default=1)
    tokens = torch.zeros(max(len(samples), 1), width, dtype=torch.long)
    index, labels, engine = [], [], []
    for row, sample in enumerate(samples):
        sequence = (*sample.prompt_tokens, *sample.response_tokens)
        tokens[row, : len(sequence)] = torch.tensor(sequence)
        first = row * width + len(sample.prompt_tokens) - 1  # the last prompt token predicts the first action
        index += range(first, first + len(sample.response_tokens))
        labels += sample.response_tokens
        engine += sample.engine_logprobs or [float("nan")] * len(sample.response_tokens)
    lengths = [len(sample.response_tokens) for sample in samples] or [0]
    return MicroBatch(
        tokens=tokens,
        positions=torch.arange(width).expand_as(tokens).contiguous(),
        action_index=torch.tensor(index, dtype=torch.long),
        labels=torch.tensor(labels, dtype=torch.long),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0),
        reward=torch.tensor([sample.reward for sample in samples] or [0.0]),
        advantage=torch.tensor([sample.advantage for sample in samples] or [0.0]),
        engine_logprobs=torch.tensor(engine, dtype=torch.float32),
    )

"""Packing: nothing lost, equal numbers of micro-batches, budgets kept, little waste, work balanced."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oreal_megatron.algo import packing
from oreal_megatron.records import PackingSpec, Sample

BUDGET = 16384


def sample(length: int) -> Sample:
    return Sample((1,), (2,) * (length - 1), 1.0, 1.0)


def realistic(number: int, seed: int) -> list[Sample]:
    """Log-normal lengths, as answers of a reasoner have: half below 3,000 tokens, none above 16,384."""
    generator = random.Random(seed)
    return [sample(max(2, min(BUDGET, round(generator.lognormvariate(8.0, 0.9))))) for _ in range(number)]


@settings(max_examples=60)
@given(st.data())
def test_packing_loses_nothing_and_gives_every_rank_the_same_number_of_micro_batches(data):
    lengths = data.draw(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 30)), max_size=30))
    ranks, budget = data.draw(st.integers(1, 5)), data.draw(st.integers(10, 200))
    multiple, pad_to = data.draw(st.integers(1, 4)), data.draw(st.sampled_from([1, 2, 8]))
    samples = [Sample((n,) * p, (n,) * r, 1.0 if n % 2 else -1.0, n) for n, (p, r) in enumerate(lengths)]
    specs = [PackingSpec(budget, rank, ranks, multiple, pad_to, 50.0) for rank in range(ranks)]
    batches = [packing.batch(samples, spec) for spec in specs]
    assert len({len(batch.micro_batches) for batch in batches}) == 1 and len(batches[0].micro_batches) % multiple == 0
    assert all(batch.counts == batches[0].counts for batch in batches) and len(batches[0].micro_batches) > 0
    found = Counter()
    for part in (part for batch in batches for part in batch.micro_batches):
        assert (
            len(part.tokens) % pad_to == 0
            and part.sequence_offsets[0] == 0
            and part.sequence_offsets[-1] == len(part.tokens)
        )
        if len(part.reward) > 1:
            assert len(part.tokens) <= budget, "only one that is longer than the budget, alone, may exceed it"
        starts = torch.tensor(part.sequence_offsets[:-1])
        lengths_here = torch.tensor(part.sequence_offsets).diff()
        assert torch.equal(torch.arange(len(part.tokens)) - part.positions, starts.repeat_interleave(lengths_here))
        owner = torch.repeat_interleave(torch.arange(len(part.advantage)), part.action_offsets.diff())
        assert (part.labels == part.advantage[owner].long()).all(), (
            "labels, sequence_offsets and advantages belong together"
        )
        assert (part.tokens[part.action_index + 1] == part.labels).all(), "the position before a token predicts it"
        found.update(part.labels.tolist())
    assert found == Counter(n for n, (_, response) in enumerate(lengths) for _ in range(response))


@settings(max_examples=60)
@given(st.data())
def test_mini_batches_are_the_prompts_in_order_each_packed_by_itself(data):
    lengths = data.draw(st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=4), min_size=1, max_size=9))
    mini_batches, ranks = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 3))
    samples = [
        Sample(
            (1,), (2,) * length, 1.0 if index % 2 else -1.0, 1.0, rollout=(3 * slot, index)
        )  # some slots are dropped
        for slot, row in enumerate(lengths)
        for index, length in enumerate(row)
    ]
    budget = data.draw(st.integers(10, 80))
    specs = [PackingSpec(budget, rank, ranks, 2) for rank in range(ranks)]
    batches = [packing.batch(samples, spec, mini_batches) for spec in specs]
    parts = packing.split_prompts(samples, mini_batches)
    prompts = [{sample.rollout[0] for sample in part} for part in parts]
    assert [sample for part in parts for sample in part] == samples, "nothing lost, in order"
    assert len(parts) == min(mini_batches, len(lengths)) and sum(map(len, prompts)) == len(lengths), (
        "no prompt is split"
    )
    assert max(map(len, prompts)) - min(map(len, prompts)) <= 1
    for spec, batch in zip(specs, batches, strict=True):
        split = batch.split()
        assert len(split) == len(parts) and batch.counts == packing.counts(samples)
        assert bool(batch.mini_batches) == (len(parts) > 1), "one of the whole step is as without mini-batches"
        assert [number for own, _ in split for number in range(len(batch.micro_batches))[own]] == [
            *range(len(batch.micro_batches))
        ]
        for (own, part), of_part in zip(split, parts, strict=True):
            alone = packing.batch(of_part, spec)
            assert part.counts == alone.counts and len(part.micro_batches) == len(alone.micro_batches)
            assert part.micro_batches == batch.micro_batches[own]
            for one, other in zip(part.micro_batches, alone.micro_batches, strict=True):
                assert torch.equal(one.rollouts, other.rollouts) and torch.equal(one.labels, other.labels)
    assert len({tuple(part.micro_batches for part in batch.mini_batches) for batch in batches}) == 1


def test_two_packed_sequences_by_hand():
    batch = packing.micro_batch([Sample((9, 8), (7, 6), 1.0, 1.0), Sample((5,), (4, 3, 2), -1.0, -1.0)], pad_to=3)
    assert batch.tokens.tolist() == [9, 8, 7, 6, 5, 4, 3, 2, 0]
    assert batch.positions.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0] and batch.sequence_offsets == (0, 4, 8, 9)
    assert batch.action_index.tolist() == [1, 2, 4, 5, 6] and batch.action_offsets.tolist() == [0, 2, 5]


def test_without_samples_there_is_filler_without_action():
    empty = packing.micro_batch([], pad_to=4)
    assert empty.tokens.tolist() == [0] * 4 and empty.sequence_offsets == (0, 4) and len(empty.labels) == 0
    assert empty.action_offsets.tolist() == [0, 0] and empty.reward.tolist() == [0.0]


@pytest.mark.parametrize("seed", range(2))
def test_less_than_3_percent_of_the_budget_stays_empty_on_realistic_lengths(seed):
    samples = realistic(512, seed)
    used = packing.batch(samples, PackingSpec(BUDGET, token_multiple=16)).micro_batches
    assert 1 - sum(map(len, samples)) / (BUDGET * len(used)) < 0.03
    assert 1 - sum(map(len, samples)) / sum(len(part.tokens) for part in used) < 0.002, "filler"


def spread(samples: list[Sample], ranks: int, counted: float) -> float:
    """How much longer than the mean the busiest rank works, when attention is `counted` in dealing."""
    shares = (packing.batch(samples, PackingSpec(BUDGET, rank, ranks, even_tokens=counted)) for rank in range(ranks))
    lengths = ([torch.tensor(part.sequence_offsets).diff() for part in share.micro_batches] for share in shares)
    loads = [packing.cost(torch.cat(share), 20_000.0).sum().item() for share in lengths]
    return max(loads) / (sum(loads) / ranks) - 1


@pytest.mark.parametrize("ranks", [2, 8])
def test_work_is_balanced_over_ranks(ranks):
    assert spread(realistic(512, 7), ranks, 20_000.0) < 0.01


def test_attention_counts_as_work():
    one_long = [sample(16000), *[sample(500)] * 96]
    assert spread(one_long, 2, 20_000.0) < 0.01 < 0.1 < spread(one_long, 2, math.inf)

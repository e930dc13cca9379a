"""KL in the reward: an fp64 oracle, centred over the other rollouts of each prompt, on any packing and any ranks."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oreal_megatron.algo import advantages, packing, reward_kl
from oreal_megatron.config import Config, LossConfig, SelectionConfig, problems
from oreal_megatron.records import PackingSpec, Sample

COEFFICIENT = 0.25


def step_of(rollouts_of_prompts: list[int], seed: int) -> tuple[list[Sample], dict[tuple[int, int], float]]:
    """Samples with RLOO advantages of random rewards, and the KL of each."""
    draw = random.Random(seed)
    samples, kls = [], {}
    for slot, count in enumerate(rollouts_of_prompts):
        rewards = [draw.choice([1.0, -1.0, -3.0]) for _ in range(count)]
        for index, (reward, advantage) in enumerate(zip(rewards, advantages.leave_one_out(rewards), strict=True)):
            tokens = tuple(draw.randrange(50) for _ in range(draw.randint(1, 9)))
            samples.append(Sample((1, 2), tokens, reward, advantage, rollout=(slot, index)))
            kls[slot, index] = draw.uniform(-3, 30)
    return samples, kls


def advantages_of(samples: list[Sample], kls: dict[tuple[int, int], float], ranks: int, budget: int):
    """The advantage of each rollout after the exchange between `ranks` replicas, whose log-probs give these KLs."""
    batches = [packing.batch(samples, PackingSpec(budget, rank, ranks)) for rank in range(ranks)]
    gathered: dict[tuple[int, int], float] = {}
    for batch in batches:
        logp, reference = [], []
        for part in batch.micro_batches:
            lengths = part.action_offsets.diff().tolist()
            gaps = [
                torch.full((length,), kls.get(tuple(key), 0.0) / max(length, 1), dtype=torch.float64)
                for key, length in zip(part.rollouts.tolist(), lengths, strict=True)
            ]
            reference.append(-torch.rand(len(part.labels), dtype=torch.float64))
            logp.append(reference[-1] + torch.cat(gaps))
        gathered |= reward_kl.response_kls(logp, reference, batch.micro_batches)
    assert gathered == pytest.approx(kls, abs=1e-9)
    centred = reward_kl.centre(gathered)
    result = {}
    for batch in batches:
        for part in reward_kl.with_kl_in_advantages(batch, centred, COEFFICIENT).micro_batches:
            pairs = zip(part.rollouts.tolist(), part.advantage.tolist(), strict=True)
            result |= {tuple(key): value for key, value in pairs if key != [-1, -1]}
    return result


@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=5),
    st.integers(0, 2**32),
    st.integers(1, 3),
    st.sampled_from([8, 64]),
)
def test_the_advantage_is_that_of_the_reward_minus_the_kl(counts, seed, ranks, budget):
    samples, kls = step_of(counts, seed)
    advantages = advantages_of(samples, kls, ranks, budget)
    for slot, count in enumerate(counts):
        rewards = [sample.reward - COEFFICIENT * kls[sample.rollout] for sample in samples if sample.rollout[0] == slot]
        total = sum(rewards)
        for index, own in enumerate(rewards):
            expected = own - (total - own) / (count - 1) if count > 1 else 0.0
            assert advantages[slot, index] == pytest.approx(expected, abs=1e-4)
        assert sum(advantages[slot, index] for index in range(count)) == pytest.approx(0, abs=1e-3), "zero-centred"


def test_one_token_far_off_counts_as_in_the_loss():
    batch = packing.batch([Sample((1,), (2, 3), 1.0, 0.5, rollout=(0, 0))], PackingSpec(64))
    logp, reference = [torch.tensor([-1.0, -1.0])], [torch.tensor([-1001.0, -1.5])]
    assert reward_kl.response_kls(logp, reference, batch.micro_batches) == {(0, 0): pytest.approx(60.5)}
    assert reward_kl.response_kls([], [], batch.micro_batches) == {}, "before the last pipeline stage"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(selection=SelectionConfig(keep="pair")), "set selection.keep to mixed or all"),
        (dict(loss=LossConfig(reward_kl_coef=0.1, advantage_on_positives=False)), "set that to true"),
        ({}, None),
    ],
)
def test_settings_under_which_it_would_mean_nothing_are_refused(changes, says):
    config = Config(selection=SelectionConfig(keep="all"), loss=LossConfig(reward_kl_coef=0.1))
    messages = problems(dataclasses.replace(config, **changes))
    assert len(messages) == bool(says) and all(says in message for message in messages)

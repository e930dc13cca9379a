"""The prefix objective and credit by differences, against formulas in plain Python floats."""

from __future__ import annotations

import math

import oreal_kernels
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oreal_kernels.prefix_reward_loss import reference

from oreal_megatron.algo import loss, packing, selection, token_weighting
from oreal_megatron.config import Config, RewardModelConfig, WeightsConfig
from oreal_megatron.records import PackingSpec, Sample

SEQUENCES = st.lists(
    st.tuples(st.sampled_from([1.0, -1.0, 0.0]), st.lists(st.integers(-96, 96).map(lambda n: n / 16), max_size=9)),
    min_size=1,
    max_size=5,
)
BELIEFS = ("prefix_mean", "token")


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def beliefs(scores: list[float], belief: str) -> list[float]:
    """Belief that the response is correct after each of its tokens."""
    values = [sum(scores[: t + 1]) / (t + 1) if belief == "prefix_mean" else scores[t] for t in range(len(scores))]
    return [sigmoid(value) for value in values]


def packed(sequences: list) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores, offsets and rewards of packed sequences."""
    offsets = torch.tensor([0, *(len(scores) for _, scores in sequences)]).cumsum(0)
    scores = torch.tensor([score for _, own in sequences for score in own], dtype=torch.float32)
    return scores.requires_grad_(), offsets, torch.tensor([reward for reward, _ in sequences])


@settings(max_examples=40)
@given(SEQUENCES, st.sampled_from(BELIEFS), st.integers(1, 9))
def test_the_loss_is_the_mean_cross_entropy_of_all_prefixes(sequences, belief, count):
    scores, offsets, reward = packed(sequences)
    total, hits = oreal_kernels.prefix_reward_loss(scores, offsets, reward, count, belief)
    expected = right = 0.0
    for outcome, own in sequences:
        if outcome and own:
            shares = [p if outcome > 0 else 1 - p for p in beliefs(own, belief)]
            expected -= sum(map(math.log, shares)) / len(own) / count
            mean = torch.tensor(own, dtype=torch.float64).mean()
            right += float((mean > 0) == (outcome > 0)) / count
    assert total.item() == pytest.approx(expected, rel=1e-5, abs=1e-6) and hits.item() == pytest.approx(right)

    (slope,) = torch.autograd.grad(total * 3, scores)
    exact = scores.detach().double().requires_grad_()
    oracle, _ = reference(exact, offsets, reward, count, belief)
    (expected_slope,) = torch.autograd.grad(oracle * 3, exact)
    torch.testing.assert_close(slope.double(), expected_slope, rtol=1e-5, atol=1e-7)
    assert oracle.item() == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("belief", BELIEFS)
def test_gradients_of_the_reference_are_those_of_finite_differences(belief):
    scores = torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    arguments = (torch.tensor([0, 3, 3, 7]), torch.tensor([1.0, 1.0, -1.0]), 2, belief)
    assert torch.autograd.gradcheck(lambda s: reference(s, *arguments)[0], (scores,))
    assert torch.autograd.gradcheck(lambda s: reference(s, *arguments)[0], (scores * 0,), atol=1e-6)


def test_on_one_token_both_objectives_are_the_same_and_the_default_is_the_mean():
    samples = [Sample((1,), (5,), reward, 0.0) for reward in (1.0, -1.0, -1.0)]
    part, counts = packing.micro_batch(samples), selection.counts(samples)
    score = torch.tensor([0.3, -0.7, 2.0])
    prefix = Config(reward_model=RewardModelConfig(objective="prefix"))
    both = [loss.reward_model(score, part, counts, config)[0].item() for config in (prefix, Config())]
    assert both[0] == pytest.approx(both[1], rel=1e-6)
    long = [Sample((1,), (5, 6, 7), 1.0, 0.0)]
    part, counts, score = packing.micro_batch(long), selection.counts(long), torch.tensor([-3.0, 0.0, 3.0])
    mean = loss.reward_model(score, part, counts, Config())[0]
    assert mean.item() == pytest.approx(math.log(2)) and loss.reward_model(score, part, counts, prefix)[0] > mean + 0.5


def test_the_objective_adds_up_over_micro_batches_and_follows_the_belief(make_samples):
    samples = make_samples(5, seed=3)
    counts = selection.counts(samples)
    generator = torch.Generator().manual_seed(1)
    table = {sample.rollout: torch.randn(len(sample.response_tokens), generator=generator) for sample in samples}
    totals = {}
    for belief in BELIEFS:
        config = Config(reward_model=RewardModelConfig(objective="prefix"), weights=WeightsConfig(belief=belief))
        for budget in (1, 30, 1000):
            parts = packing.batch(samples, PackingSpec(budget, token_multiple=4)).micro_batches
            scores = [torch.cat([table[tuple(key)] for key in part.rollouts.tolist()]) for part in parts]
            losses = [loss.reward_model(s, p, counts, config)[0] for s, p in zip(scores, parts, strict=True)]
            totals[belief, budget] = sum(float(value) for value in losses)
    for belief in BELIEFS:
        assert totals[belief, 1] == pytest.approx(totals[belief, 30]) == pytest.approx(totals[belief, 1000])
    assert totals["token", 1] != pytest.approx(totals["prefix_mean", 1], rel=1e-2)


def test_an_unknown_belief_is_refused():
    with pytest.raises(ValueError, match="belief is 'last'; expected one of prefix_mean, token"):
        oreal_kernels.prefix_reward_loss(torch.zeros(1), torch.tensor([0, 1]), torch.ones(1), 1, "last")


@settings(max_examples=60)
@given(SEQUENCES, st.sampled_from(BELIEFS), st.sampled_from([(0.5, 0.5), (0.0, 0.25), (0.6, 0.0)]))
def test_credit_by_difference_is_the_change_of_the_belief_in_the_outcome(sequences, belief, thresholds):
    samples = [Sample((1,), (5,) * len(own), reward or -1.0, 0.0) for reward, own in sequences]
    config = WeightsConfig(
        belief=belief, credit="difference", threshold_correct=thresholds[0], threshold_incorrect=thresholds[1]
    )
    weight_T = token_weighting.importance(packed(sequences)[0], packing.micro_batch(samples), config)
    expected = []
    for sample, (_, own) in zip(samples, sequences, strict=True):
        before = 0.5
        for value in beliefs(own, belief):
            change = (value - before) * sample.reward
            threshold = thresholds[0 if sample.reward > 0 else 1]
            expected.append(min(max(((1 + change) / 2 - threshold) / (1 - threshold), 0.0), 1.0))
            before = value
    assert weight_T.tolist() == pytest.approx(expected, abs=2e-6) and not weight_T.requires_grad


def test_credit_by_difference_falls_on_the_token_that_turns_the_belief_only():
    part = packing.micro_batch([Sample((1,), (5,) * 6, -1.0, 0.0)])
    score = torch.tensor([0.0, 0.0, 0.0, -4.0, -4.0, -4.0])
    whole = token_weighting.importance(score, part, WeightsConfig(belief="token"))
    change = token_weighting.importance(score, part, WeightsConfig(belief="token", credit="difference"))
    assert whole.tolist() == pytest.approx([0, 0, 0, 0.964, 0.964, 0.964], abs=1e-3)
    assert change.tolist() == pytest.approx([0, 0, 0, 0.482, 0, 0], abs=1e-3)
    share = WeightsConfig(belief="token", credit="difference", rescale="top_share", top_share=0.34)
    assert token_weighting.importance(score, part, share).argmax() == 3

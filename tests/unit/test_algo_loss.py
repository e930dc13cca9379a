"""The losses against the paper's formulas written answer by answer in fp64, and the signs of their gradients."""

from __future__ import annotations

import dataclasses
import math

import oreal_kernels
import pytest
import torch

from oreal_megatron.algo import loss, packing, token_weighting
from oreal_megatron.config import Config, LossConfig, WeightsConfig
from oreal_megatron.records import Counts


def oracle(samples, logps, references, scores, config: LossConfig, threshold: float = 0.5) -> float:
    """OREAL's policy loss in plain Python floats, one answer and one token after the other."""
    correct_tokens = sum(len(s.response_tokens) for s in samples if s.reward > 0)
    incorrect_tokens = sum(len(s.response_tokens) for s in samples if s.reward < 0)
    action_tokens, total = correct_tokens + incorrect_tokens, 0.0
    if config.normalise == "joint":
        correct_tokens = incorrect_tokens = action_tokens
    for sample, logp, reference, score in zip(samples, logps, references, scores, strict=True):
        for t in range(len(sample.response_tokens)):
            mean_so_far = sum(score[: t + 1]) / (t + 1)
            right = 1 / (1 + math.exp(-mean_so_far))
            merit = right if sample.reward > 0 else 1 - right
            weight = min(max((merit - threshold) / (1 - threshold), 0.0), 1.0)
            if sample.reward > 0:
                advantage = sample.advantage if config.advantage_on_positives else 1.0
                total += config.positive_coef * -logp[t] * weight * advantage / correct_tokens
            else:
                total += config.negative_coef * -1.0 * weight * sample.advantage / incorrect_tokens
            d = reference[t] - logp[t]
            kl = {"k1": -d, "k1_reversed": d, "k2": d * d / 2, "k3": math.exp(d) - d - 1}[config.kl_kind]
            total += config.kl_coef * kl / action_tokens
    return total


def oracle_gradient(samples, logps, references, scores, config: LossConfig) -> list[float]:
    """d loss / d logp of each token, by hand: the ratio of the negative term has value 1 and derivative 1."""
    correct_tokens = sum(len(s.response_tokens) for s in samples if s.reward > 0)
    incorrect_tokens = sum(len(s.response_tokens) for s in samples if s.reward < 0)
    action_tokens, slopes = correct_tokens + incorrect_tokens, []
    if config.normalise == "joint":
        correct_tokens = incorrect_tokens = action_tokens
    for sample, logp, reference, score in zip(samples, logps, references, scores, strict=True):
        for t in range(len(sample.response_tokens)):
            right = 1 / (1 + math.exp(-sum(score[: t + 1]) / (t + 1)))
            weight = max(2 * right - 1, 0.0) if sample.reward > 0 else max(1 - 2 * right, 0.0)
            factor = weight * (sample.advantage if sample.reward < 0 or config.advantage_on_positives else 1.0)
            coefficient, tokens = (
                (config.positive_coef, correct_tokens)
                if sample.reward > 0
                else (config.negative_coef, incorrect_tokens)
            )
            d = reference[t] - logp[t]
            kl_slope = {"k1": 1.0, "k1_reversed": -1.0, "k2": -d, "k3": 1 - math.exp(d)}[config.kl_kind]
            slopes.append(-coefficient * factor / tokens + config.kl_coef * kl_slope / action_tokens)
    return slopes


@pytest.fixture
def case(make_samples):
    samples = make_samples(5, seed=3)
    generator = torch.Generator().manual_seed(0)

    def draw(scale: float, shift: float) -> list[list[float]]:
        return [
            (torch.randn(len(s.response_tokens), generator=generator, dtype=torch.float64) * scale + shift).tolist()
            for s in samples
        ]

    return samples, draw(0.5, -1.5), draw(0.5, -1.5), draw(2.0, 0.1)


def policy_loss(logp, reference, weight, batch, counts, config):
    """The loss on log-probs, of which the fused head's is a test's claim in tests/kernels."""
    return oreal_kernels.oreal_loss(logp, loss.terms(reference, weight, batch, counts, config))


def joined(rows: list[list[float]]) -> torch.Tensor:
    return torch.tensor([value for row in rows for value in row], dtype=torch.float64)


@pytest.mark.parametrize("kl_kind", ["k1", "k1_reversed", "k2", "k3"])
@pytest.mark.parametrize(("advantage_on_positives", "normalise"), [(True, "side"), (False, "side"), (True, "joint")])
def test_loss_and_gradient_equal_the_oracle(case, kl_kind, advantage_on_positives, normalise):
    samples, logps, references, scores = case
    config = LossConfig(
        kl_kind=kl_kind, advantage_on_positives=advantage_on_positives, kl_coef=0.3, normalise=normalise
    )
    batch = packing.micro_batch(samples)
    logp = joined(logps).requires_grad_()
    weight = token_weighting.importance(joined(scores), batch, WeightsConfig()).double()
    total, sums = policy_loss(logp, joined(references), weight, batch, packing.counts(samples), config)
    parts = loss.metrics(total, sums, packing.counts(samples), config)
    for side, sign in (("correct", 1), ("incorrect", -1)):  # a mean over the side's tokens, whatever the denominator
        own_T = torch.cat([torch.full((len(s.response_tokens),), s.reward == sign) for s in samples])
        assert parts[f"weights/{side}_mean"].item() == pytest.approx(weight[own_T].mean().item(), abs=1e-6)
    sum_of_parts = parts["loss/positive"] + config.negative_coef * parts["loss/negative"] + 0.3 * parts["loss/kl"]
    assert sum_of_parts.item() == pytest.approx(total.item(), abs=1e-6)
    total.backward()
    assert total.item() == pytest.approx(oracle(samples, logps, references, scores, config), abs=1e-6)
    expected = torch.tensor(oracle_gradient(samples, logps, references, scores, config), dtype=torch.float64)
    torch.testing.assert_close(logp.grad, expected, atol=1e-6, rtol=0)


def test_reinforce_is_the_gradient_of_reward_times_logp_over_all_tokens(make_samples):
    """The ablation's first row: advantage="reward", normalise="joint", weight 1, no KL."""
    samples = [dataclasses.replace(s, advantage=s.reward) for s in make_samples(4, seed=2)[1:]]
    logp = torch.full((sum(len(s.response_tokens) for s in samples),), -1.3, requires_grad=True)
    config = LossConfig(negative_coef=1.0, kl_coef=0.0, normalise="joint")
    batch, counts = packing.micro_batch(samples), packing.counts(samples)
    policy_loss(logp, logp.detach(), torch.ones_like(logp), batch, counts, config)[0].backward()
    reward_T = torch.cat([torch.full((len(s.response_tokens),), s.reward) for s in samples])
    torch.testing.assert_close(logp.grad, -reward_T / len(logp))


def test_any_cut_into_micro_batches_adds_up(case):
    samples, logps, references, scores = case
    counts, config = packing.counts(samples), LossConfig()

    def total_of(indices: list[int]) -> float:
        batch = packing.micro_batch([samples[i] for i in indices])
        picked = [joined([rows[i] for i in indices]) for rows in (logps, references, scores)]
        weight = token_weighting.importance(picked[2], batch, WeightsConfig())
        return policy_loss(picked[0], picked[1], weight, batch, counts, config)[0].item()

    whole = total_of(list(range(10)))
    for cut in ([[0], [1, 2], [3, 4, 5, 6, 7, 8, 9]], [[i] for i in range(10)], [[9, 0, 5], [], [1, 2, 3, 4, 6, 7, 8]]):
        assert sum(total_of(part) for part in cut) == pytest.approx(whole, abs=1e-7)


def gradient_of(
    reward: float, advantage: float, logp: float, reference: float, config: LossConfig, make_samples
) -> float:
    sample = make_samples(1)[0 if reward > 0 else 1]
    batch = packing.micro_batch([type(sample)(sample.prompt_tokens, (5,), reward, advantage)])
    value = torch.tensor([logp], requires_grad=True)
    counts = Counts(1, 1, int(reward > 0), int(reward < 0))
    policy_loss(value, torch.tensor([reference]), torch.ones(1), batch, counts, config)[0].backward()
    return value.grad.item()


def test_a_right_token_is_made_likelier_and_more_so_on_hard_prompts(make_samples):
    easy = gradient_of(1.0, 0.2, -1.0, -1.0, LossConfig(), make_samples)
    hard = gradient_of(1.0, 1.8, -1.0, -1.0, LossConfig(), make_samples)
    assert hard < easy < 0  # descending the loss raises logp


def test_a_wrong_token_is_made_less_likely(make_samples):
    assert gradient_of(-1.0, -1.0, -1.0, -1.0, LossConfig(), make_samples) > 0


@pytest.mark.parametrize("kl_kind", ["k2", "k3"])
@pytest.mark.parametrize("reward", [1.0, -1.0])
def test_kl_pulls_back_to_the_reference_on_right_and_wrong_answers(kl_kind, reward, make_samples):
    only_kl = LossConfig(positive_coef=0.0, negative_coef=0.0, kl_coef=1.0, kl_kind=kl_kind)
    assert gradient_of(reward, reward, logp=-0.5, reference=-1.5, config=only_kl, make_samples=make_samples) > 0
    assert gradient_of(reward, reward, logp=-1.5, reference=-0.5, config=only_kl, make_samples=make_samples) < 0
    assert gradient_of(reward, reward, logp=-1.0, reference=-1.0, config=only_kl, make_samples=make_samples) == 0


def test_kl_estimates_by_hand(make_samples):
    logp, reference = torch.tensor([-1.0]), torch.tensor([-1.5])
    batch, counts = packing.micro_batch([type(make_samples(1)[0])((1,), (5,), 1.0, 1.0)]), Counts(1, 1, 1, 0)
    found = {}
    for kind in oreal_kernels.KL_KINDS:
        only_kl = LossConfig(positive_coef=0.0, negative_coef=0.0, kl_coef=1.0, kl_kind=kind)
        found[kind] = policy_loss(logp, reference, torch.ones(1), batch, counts, only_kl)[0].item()
    assert found == pytest.approx({"k1": 0.5, "k1_reversed": -0.5, "k2": 0.125, "k3": math.exp(-0.5) + 0.5 - 1})


def test_reward_model_loss_is_cross_entropy_of_the_mean_score(make_samples):
    samples = make_samples(3, seed=5)
    batch = packing.micro_batch(samples)
    score = torch.randn(len(batch.labels), generator=torch.Generator().manual_seed(1)).requires_grad_()
    total, metrics = loss.reward_model(score, batch, packing.counts(samples), Config())
    expected, hits, place = 0.0, 0, 0
    for sample in samples:
        length = len(sample.response_tokens)
        mean = sum(score[place : place + length].tolist()) / length
        p = 1 / (1 + math.exp(-mean))
        expected -= math.log(p if sample.reward > 0 else 1 - p) / len(samples)
        hits += (mean > 0) == (sample.reward > 0)
        place += length
    assert total.item() == pytest.approx(expected, abs=1e-6)
    assert metrics["reward_model/accuracy"].item() == pytest.approx(hits / len(samples))
    total.backward()
    first = len(samples[0].response_tokens)
    assert (score.grad[:first] < 0).all(), "descending raises the scores of a right answer"
    assert (score.grad[first : first + len(samples[1].response_tokens)] > 0).all()


def test_an_empty_micro_batch_adds_nothing(make_samples):
    counts = packing.counts(make_samples(2))
    empty = packing.micro_batch([])
    nothing = torch.zeros(0, requires_grad=True)
    for total, _ in (
        policy_loss(nothing, torch.zeros(0), torch.zeros(0), empty, counts, LossConfig()),
        loss.reward_model(nothing, empty, counts, Config()),
        loss.supervised(nothing, counts),
    ):
        assert total.item() == 0
        total.backward()


def test_only_right_answers_or_only_wrong_ones_do_not_divide_by_zero(make_samples):
    for sample in make_samples(1):
        batch, counts = packing.micro_batch([sample]), packing.counts([sample])
        logp = torch.full((len(batch.labels),), -1.0)
        assert math.isfinite(policy_loss(logp, logp, torch.ones_like(logp), batch, counts, LossConfig())[0].item())

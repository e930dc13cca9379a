"""Importance ratios of tokens that the engine sampled: their value, their place in the loss, and what they need."""

from __future__ import annotations

import dataclasses
import math

import oreal_kernels
import pytest
import torch

from oreal_megatron import config as c
from oreal_megatron.algo import importance, loss, packing
from oreal_megatron.records import Prompt, Rollout


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cap", [1.0, 2.0, 10.0])
def test_the_ratio_is_the_quotient_of_probabilities_up_to_the_cap(dtype, cap):
    generator = torch.Generator().manual_seed(0)
    logp = (-4 * torch.rand(500, generator=generator)).to(dtype).requires_grad_()
    behaviour = (-4 * torch.rand(500, generator=generator)).to(dtype)
    ratio = importance.truncated_ratio(logp, behaviour, cap)
    expected = (logp.detach().double().exp() / behaviour.double().exp()).clamp(max=cap)
    torch.testing.assert_close(ratio.double(), expected, rtol=1e-6 if dtype != torch.float64 else 1e-12, atol=0)
    assert not ratio.requires_grad and ratio.max() <= cap * (1 + 1e-6) and (expected == cap).any()


def test_no_pair_of_log_probs_overflows_and_only_a_broken_policy_gives_nan():
    logp = torch.tensor([0.0, -1e30, -1e4, 0.0, -3.0, math.nan])
    behaviour = torch.tensor([-1e30, 0.0, -math.inf, 0.0, math.nan, -1.0])
    ratio = importance.truncated_ratio(logp, behaviour, 2.0)
    torch.testing.assert_close(ratio, torch.tensor([2.0, 0.0, 2.0, 1.0, 1.0, math.nan]), equal_nan=True)


@pytest.mark.parametrize("cap", [0.0, 0.99, -1.0, math.nan])
def test_a_cap_below_one_is_refused(cap):
    with pytest.raises(ValueError, match="expected at least 1"):
        importance.truncated_ratio(torch.zeros(1), torch.zeros(1), cap)


def test_a_cap_without_behaviour_is_refused(make_samples):
    batch, counts = packing.micro_batch(make_samples(1)), packing.counts(make_samples(1))
    zero_T = torch.zeros(len(batch.labels))
    terms = loss.terms(zero_T, zero_T, batch, counts, c.LossConfig(ratio_cap=2.0))
    with pytest.raises(ValueError, match="behaviour_logp"):
        dataclasses.replace(terms, behaviour_logp=None)


def test_the_loss_is_that_of_weighted_tokens_on_incorrect_samples_only(make_samples):
    """The gradient of every token in fp64, from Eq. 11 with r = min(pi / engine, cap) on incorrect samples."""
    generator = torch.Generator().manual_seed(1)
    samples = [
        dataclasses.replace(
            s, engine_logprobs=tuple((-2 * torch.rand(len(s.response_tokens), generator=generator)).tolist())
        )
        for s in make_samples(4, seed=3)
    ]
    batch, counts, config = packing.micro_batch(samples), packing.counts(samples), c.LossConfig(ratio_cap=1.5)
    logp = (-2 * torch.rand(len(batch.labels), generator=generator, dtype=torch.float64)).requires_grad_()
    weight = torch.rand(len(logp), generator=generator, dtype=torch.float64)
    terms = loss.terms(logp.detach() - 0.3, weight, batch, counts, config)
    oreal_kernels.oreal_loss(logp, terms)[0].backward()
    expected, engine = [], batch.engine_logprobs.double().tolist()
    owners = [s for s in samples for _ in s.response_tokens]
    for t, (sample, value) in enumerate(zip(owners, logp.tolist(), strict=True)):
        slope = config.kl_coef * (1 - math.exp(-0.3)) / counts.action_tokens
        if sample.reward > 0:
            slope -= config.positive_coef * weight[t].item() * sample.advantage / counts.correct_tokens
        else:
            ratio = min(math.exp(value - engine[t]), 1.5)
            slope -= config.negative_coef * ratio * weight[t].item() * sample.advantage / counts.incorrect_tokens
        expected.append(slope)
    torch.testing.assert_close(logp.grad, torch.tensor(expected, dtype=torch.float64), atol=1e-7, rtol=1e-5)
    metrics = importance.metrics(logp, batch, counts.incorrect_tokens, c.LossConfig(ratio_cap=1.5))
    ratios = [min(math.exp(v - e), 1.5) for s, v, e in zip(owners, logp.tolist(), engine, strict=True) if s.reward < 0]
    assert metrics["policy/ratio_mean"].item() == pytest.approx(sum(ratios) / len(ratios))
    assert metrics["policy/ratio_capped_share"].item() == pytest.approx(ratios.count(1.5) / len(ratios))
    assert 0 < ratios.count(1.5) < len(ratios)


def test_metrics_of_ratios_add_up_over_micro_batches(make_samples):
    samples = [
        dataclasses.replace(s, engine_logprobs=(-1.0,) * len(s.response_tokens)) for s in make_samples(3, seed=5)
    ]
    tokens = packing.counts(samples).incorrect_tokens

    def metrics_of(some) -> dict[str, float]:
        batch = packing.micro_batch(some)
        logp_T = -1.5 + batch.labels.float().sin()
        config = c.LossConfig(ratio_cap=1.2)
        return {name: value.item() for name, value in importance.metrics(logp_T, batch, tokens, config).items()}

    total, parts = metrics_of(samples), [metrics_of(samples[:2]), metrics_of([]), metrics_of(samples[2:])]
    assert {name: sum(part[name] for part in parts) for name in total} == pytest.approx(total)


def test_rollouts_without_log_probs_of_the_engine_are_refused():
    prompt = Prompt(0, "q", "1", None, (1, 2))
    complete = Rollout(prompt, 0, 0, (5, 6), "", True, (-1.0, -2.0))
    importance.require_logprobs([[complete]], 7)
    for logprobs in (None, (), (-1.0,)):
        lacking = dataclasses.replace(complete, index=3, logprobs=logprobs)
        with pytest.raises(importance.MissingLogprobs, match=r"step 7: 1 of 2 rollouts.*prompt 0, rollout 3"):
            importance.require_logprobs([[complete, lacking]], 7)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(loss=c.LossConfig(ratio_cap=0.5), sampling=c.SamplingConfig(top_p=1.0)), "loss.ratio_cap is 0.5"),
        (dict(loss=c.LossConfig(ratio_cap=2.0), sampling=c.SamplingConfig(top_p=0.9)), "set sampling.top_p=1.0"),
        (dict(loss=c.LossConfig(ratio_cap=2.0), sampling=c.SamplingConfig(top_p=1.0, min_p=0.1)), "sampling.min_p=0,"),
        (dict(loss=c.LossConfig(ratio_cap=2.0), sampling=c.SamplingConfig(top_p=1.0, temperature=0.7)), ""),
        (dict(sampling=c.SamplingConfig(top_p=0.9)), ""),
    ],
)
def test_ratios_need_the_distribution_that_the_log_probs_are_of(settings, message):
    about_ratios = [problem for problem in c.problems(c.Config(**settings)) if "ratio_cap" in problem]
    assert len(about_ratios) == bool(message) and all(message in problem for problem in about_ratios)

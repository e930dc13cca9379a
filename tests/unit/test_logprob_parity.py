"""Metrics of the mismatch of engine and trainer against statistics in plain Python, and their independence of ranks."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch

from oreal_megatron.algo import logprob_parity, packing
from oreal_megatron.config import EngineConfig
from oreal_megatron.records import PackingSpec, Prompt, Rollout


def differences_of(values: list[float]) -> dict[str, float]:
    return logprob_parity.mismatch_metrics(torch.tensor(values))


@pytest.mark.parametrize("tokens", [1, 2, 99, 100, 101, 500])
def test_mismatch_equals_plain_python(tokens):
    generator = random.Random(tokens)
    values = [generator.gauss(0.0, 0.3) for _ in range(tokens)]
    metrics = differences_of(values)
    gaps = sorted(map(abs, values))
    at_most_p99 = sum(gap <= metrics["parity/token_gap_p99"] + 1e-6 for gap in gaps)
    assert at_most_p99 >= 0.99 * tokens > at_most_p99 - 1, "the smallest gap that 99 % of the tokens do not exceed"
    expected = {
        "parity/token_gap_mean": sum(gaps) / tokens,
        "parity/token_gap_max": gaps[-1],
        "parity/kl_k3": sum(math.exp(d) - d - 1 for d in values) / tokens,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_k3_estimates_the_divergence_of_engine_and_trainer():
    """Over all tokens of a vocabulary, weighted by the engine's probability, k3 is KL(engine || trainer) exactly."""
    generator = torch.Generator().manual_seed(0)
    engine, trainer = (torch.randn(4, generator=generator).double().log_softmax(0) for _ in range(2))
    k3 = sum(
        engine[token].exp().item() * differences_of([(trainer - engine)[token].item()])["parity/kl_k3"]
        for token in range(4)
    )
    assert k3 == pytest.approx((engine.exp() * (engine - trainer)).sum().item(), rel=1e-4)


def test_equal_log_probs_and_no_tokens_are_zero():
    assert set(differences_of([0.0] * 7).values()) == set(differences_of([]).values()) == {0.0}


def rollouts_of(prompts: int, per_prompt: int, tokens: int = 5) -> list[list[Rollout]]:
    return [
        [
            Rollout(Prompt(slot, "", "", None, (1, 2)), slot, k, (5,) * tokens, "", True, (-1.0 - slot / 8,) * tokens)
            for k in range(per_prompt)
        ]
        for slot in range(prompts)
    ]


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_every_replica_is_checked_and_no_more_rollouts_than_the_setting_says(replicas):
    """Also where all rollouts have log-probs, as with loss.ratio_cap."""
    rollouts, config = rollouts_of(8, 4), EngineConfig(parity_rollouts=2, parity_tokens=3)
    samples = logprob_parity.samples(rollouts, config, replicas)
    assert len(samples) == 2 * replicas and {len(sample.response_tokens) for sample in samples} == {3}
    checked = [(slot, k) for slot in range(8) for k in range(4) if logprob_parity.is_checked(slot, k, config, replicas)]
    assert len(checked) == len(samples)
    for replica in range(replicas):
        assert sum((slot + k) % replicas == replica for slot, k in checked) == 2, "rollouts/requests.deal"
    without = [[replace(rollout, logprobs=None) for rollout in row] for row in rollouts]
    assert logprob_parity.samples(without, config, replicas) == []


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_metrics_do_not_depend_on_the_ranks_that_share_the_tokens(ranks):
    samples = logprob_parity.samples(rollouts_of(7, 1), EngineConfig(parity_rollouts=7), 1)

    def difference_on(rank: int) -> logprob_parity.Difference:
        batch = packing.batch(samples, PackingSpec(16, rank=rank, ranks=ranks))
        scored = [torch.full((len(part.labels),), -1.5) for part in batch.micro_batches]
        return logprob_parity.difference(scored, batch, tolerance=1.0)

    first_stage = logprob_parity.difference(None, packing.batch(samples, PackingSpec(16)), tolerance=1.0)
    metrics = logprob_parity.check([first_stage, *map(difference_on, range(ranks))], 1.0, version=0, step=0)
    assert metrics == pytest.approx(
        {
            "parity/logprob_gap": 0.5,
            "parity/capped_gap": 0.5,
            "parity/tokens": 35,
            "parity/token_gap_mean": sum(abs(-0.5 + slot / 8) for slot in range(7)) / 7,
            "parity/token_gap_p99": 0.5,
            "parity/token_gap_max": 0.5,
            "parity/kl_k3": sum(math.expm1(-0.5 + s / 8) - (-0.5 + s / 8) for s in range(7)) / 7,
        }
    )

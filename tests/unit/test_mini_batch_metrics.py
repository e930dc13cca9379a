"""Metrics of several updates of a step: means over tokens are those of the step, whatever each update was given."""

from __future__ import annotations

import itertools

import oreal_kernels
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oreal_megatron.algo import importance, loss, packing, selection
from oreal_megatron.config import LossConfig
from oreal_megatron.mcore.trainer import mean_metrics
from oreal_megatron.records import Sample

# Rewards and lengths of the samples of each mini-batch.
samples = st.tuples(st.sampled_from([1.0, -1.0]), st.integers(1, 5))
steps = st.lists(st.lists(samples, min_size=1, max_size=4), min_size=1, max_size=4)


def samples_of(step: list[list[tuple[float, int]]]) -> list[list[Sample]]:
    """Samples with log-probs of the engine that differ from token to token."""
    values = itertools.count()
    return [
        [Sample((1,), (2,) * length, reward, reward, tuple(-(next(values) % 7) / 7 for _ in range(length)))
         for reward, length in part]
        for part in step
    ]  # fmt: skip


def metrics_of(samples: list[Sample], config: LossConfig) -> dict[str, float]:
    """Metrics of an update with log-probs of -0.3, on samples whose weights are 0.5."""
    batch, counts = packing.micro_batch(samples), selection.counts(samples)
    logp_T = torch.full((len(batch.labels),), -0.3, dtype=torch.float64)
    terms = loss.terms(logp_T - 0.1, torch.full_like(logp_T, 0.5), batch, counts, config)
    metrics = loss.metrics(*oreal_kernels.oreal_loss(logp_T, terms), counts, config)
    metrics |= importance.metrics(logp_T, batch, counts.incorrect_tokens, config)
    return {name: float(value) for name, value in metrics.items()}


@pytest.mark.parametrize("normalise", ["side", "joint"])
@given(step=steps)
def test_means_over_tokens_are_those_of_all_samples_at_once(normalise, step):
    """A mini-batch without tokens of a side has no such mean, and counts for nothing in that of the step."""
    config, parts = LossConfig(ratio_cap=1.2, normalise=normalise), samples_of(step)
    tokens = [loss.metric_tokens(selection.counts(part), config) for part in parts]
    metrics = mean_metrics([metrics_of(part, config) for part in parts], tokens)
    expected = metrics_of([sample for part in parts for sample in part], config)
    totals = [metrics_of(part, config)["loss/total"] for part in parts]
    assert metrics == pytest.approx(expected | {"loss/total": sum(totals) / len(parts)}, rel=1e-5, abs=1e-9)
    rewards = {reward for part in step for reward, _ in part}
    assert ("policy/ratio_mean" in metrics) == ("weights/incorrect_mean" in metrics) == (-1.0 in rewards)
    assert ("weights/correct_mean" in metrics) == (1.0 in rewards)


def test_other_metrics_are_means_over_the_updates_that_have_them_and_the_state_is_the_last():
    updates = [{"own/x": 1.0, "updates": 3, "gradient_norm": 2.0}, {"updates": 4, "gradient_norm": 4.0}]
    assert mean_metrics(updates, [{}, {}]) == {"own/x": 1.0, "updates": 4, "gradient_norm": 3.0}
    assert mean_metrics(updates[:1], [{"own/x": 7}]) == updates[0]

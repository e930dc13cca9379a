"""GRPO and DAPO, made of extension points: advantages and loss terms against plain formulas, and their settings."""

from __future__ import annotations

import math

import pytest
import torch
from repository import ROOT

from oreal_megatron import settings
from oreal_megatron.algo import advantages, loss_term, packing
from oreal_megatron.config import Config, validate
from oreal_megatron.config.user_functions import check_functions
from oreal_megatron.records import Sample

# Recipe -> lower and upper clip.
CLIPS = {"grpo": (0.2, 0.2), "dapo": (0.2, 0.28)}


def recipe(name: str) -> Config:
    config = settings.from_recipe(f"{ROOT}/examples/recipes/{name}.py:{name}")
    check_functions(config)
    return config


def oracle(name: str, samples: list[Sample], logps: list[list[float]], olds: list[list[float]]) -> float:
    """Objective in plain Python floats, one response and one token after the other."""
    low, high = CLIPS[name]
    total, tokens = 0.0, sum(len(sample.response_tokens) for sample in samples)
    for sample, logp, old in zip(samples, logps, olds, strict=True):
        gains = []
        for new, before in zip(logp, old, strict=True):
            ratio = math.exp(new - before)
            bounded = min(max(ratio, 1 - low), 1 + high)
            gains.append(min(ratio * sample.advantage, bounded * sample.advantage))
        total -= sum(gains) / len(gains) / len(samples) if name == "grpo" else sum(gains) / tokens
    return total


@pytest.mark.parametrize("name", CLIPS)
def test_the_loss_term_and_its_gradient_equal_the_oracle(name):
    generator = torch.Generator().manual_seed(5)
    lengths, values = (3, 9, 1, 6), (1.5, -0.75, -1.25, 0.5)  # exact in fp32
    samples = [
        Sample((1, 2), tuple(range(length)), 1.0 if a > 0 else -1.0, a)
        for length, a in zip(lengths, values, strict=True)
    ]
    old_T = -torch.rand(sum(lengths), generator=generator, dtype=torch.float64)
    logp_T = old_T + torch.randn(sum(lengths), generator=generator, dtype=torch.float64) * 0.4
    term, batch = loss_term.loss_term(recipe(name)), packing.micro_batch(samples)
    leaf = logp_T.clone().requires_grad_()
    tokens = loss_term.action_tokens(batch, old_T * 0, old_T * 0 + 1, old_T)
    value, metrics = term(leaf, tokens, packing.counts(samples))
    value.backward()

    def objective(logp_T: torch.Tensor) -> float:
        rows = [row.tolist() for row in logp_T.split(lengths)]
        return oracle(name, samples, rows, [row.tolist() for row in old_T.split(lengths)])

    assert value.item() == pytest.approx(objective(logp_T), abs=1e-6)
    step = torch.eye(len(logp_T), dtype=torch.float64) * 1e-6
    slopes = [(objective(logp_T + d) - objective(logp_T - d)) / 2e-6 for d in step]
    torch.testing.assert_close(leaf.grad, torch.tensor(slopes, dtype=torch.float64), atol=1e-8, rtol=1e-6)
    assert (leaf.grad == 0).sum() == round(metrics["own/clipped_share"].item() * sum(lengths)) > 2


def test_only_dapo_lets_a_likely_token_rise_above_the_lower_clip():
    tokens = loss_term.action_tokens(
        packing.micro_batch([Sample((1,), (2,), 1.0, 1.0)]), torch.zeros(1), torch.ones(1), torch.zeros(1)
    )
    for name, moves in (("grpo", False), ("dapo", True)):
        logp_T = torch.tensor([math.log(1.25)], requires_grad=True)
        loss_term.loss_term(recipe(name))(logp_T, tokens, packing.counts([Sample((1,), (2,), 1.0, 1.0)]))[0].backward()
        assert (logp_T.grad != 0).item() == moves


def test_advantages_are_normalised_within_the_group():
    rule = advantages.advantage_rule(recipe("grpo").selection)
    assert rule([1.0, -1.0, -1.0, -1.0]) == pytest.approx([math.sqrt(3), *[-1 / math.sqrt(3)] * 3], rel=1e-5)
    assert rule([1.0, 1.0]) == [0.0, 0.0]
    assert advantages.advantage_rule(recipe("dapo").selection)([1.0, -1.0]) == pytest.approx([1.0, -1.0], rel=1e-5)


def test_samples_and_built_in_terms_are_those_of_the_papers():
    grpo, dapo = recipe("grpo"), recipe("dapo")
    assert (grpo.selection.keep, dapo.selection.keep, dapo.rollout.enough) == ("all", "mixed", "mixed")
    assert [c.loss.positive_coef + c.loss.negative_coef for c in (grpo, dapo)] == [0, 0]
    assert grpo.loss.kl_coef > 0 == dapo.loss.kl_coef and dapo.loss.passes == 1
    assert [(c.loss.updates_per_step, c.loss.mini_batches) for c in (grpo, dapo)] == [(4, 4)] * 2
    validate(grpo)
    validate(dapo)
    assert not grpo.reward_model.enabled and not dapo.reward_model.enabled

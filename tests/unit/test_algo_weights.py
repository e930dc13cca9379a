"""Token weights against the formulas of the paper and of the authors' code, written token by token in fp64."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oreal_kernels import backend
from repository import ROOT

from oreal_megatron.algo import packing, token_weighting
from oreal_megatron.config import Config, ConfigError, RewardModelConfig, RunStopped, WeightsConfig
from oreal_megatron.records import Batch, Sample


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def micro_batch(*samples: tuple[float, int]):
    """Samples given as (reward, response tokens)."""
    return packing.micro_batch([Sample((1,), tuple(range(5, 5 + n)), reward, reward) for reward, n in samples])


def authors_weights(scores: list[float], correct: bool, config: WeightsConfig) -> list[float]:
    """Return one response's weights as train_oreal.py computes them, threshold_rescale; belief="token": Eq. 10.

    Theirs: the prefix means, their sigmoid p (1 - p for an incorrect response), (p - threshold).clamp(0), divided by
    1 - threshold. Eq. 10 with 0.5: max(2 sigmoid(w_t) - 1, 0) and max(1 - 2 sigmoid(w_t), 0).
    """
    weights = []
    for t, score in enumerate(scores):
        w = sum(scores[: t + 1]) / (t + 1) if config.belief == "prefix_mean" else score
        p = sigmoid(w) if correct else 1 - sigmoid(w)
        threshold = config.threshold_correct if correct else config.threshold_incorrect
        weights.append(max(p - threshold, 0) / (1 - threshold))
    return weights


THRESHOLD = st.sampled_from([0.0, 0.25, 0.5, 0.7])


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.sampled_from([1.0, -1.0]), st.integers(1, 40)), min_size=1, max_size=5),
    st.sampled_from(["prefix_mean", "token"]), THRESHOLD, THRESHOLD, st.integers(0, 1000),
    st.sampled_from(["reference", "native"]),
)  # fmt: skip
def test_weights_equal_the_formula(rows, belief, threshold_correct, threshold_incorrect, seed, served_by):
    config = WeightsConfig(belief, "threshold", threshold_correct, threshold_incorrect)
    batch = micro_batch(*rows)
    scores = torch.randn(len(batch.labels), generator=torch.Generator().manual_seed(seed)) * 2
    leaf = scores.clone().requires_grad_()
    with backend.use(served_by):
        result = token_weighting.importance(leaf, batch, config)
    parts = zip(scores.split([n for _, n in rows]), rows, strict=True)
    expected = [weight for part, (reward, _) in parts for weight in authors_weights(part.tolist(), reward > 0, config)]
    assert result.tolist() == pytest.approx(expected, abs=2e-6)
    assert not result.requires_grad


@pytest.mark.parametrize("served_by", ["reference", "native"])
def test_eq_10_as_printed_sees_the_token_that_the_prefix_mean_hides(served_by):
    """A single wrong step after many good ones: its own score is weighed, the mean up to it is not."""
    scores, config = torch.tensor([3.0] * 9 + [-4.0]), WeightsConfig(belief="token")
    with backend.use(served_by):
        printed = token_weighting.importance(scores, micro_batch((-1.0, 10)), config)
        released = token_weighting.importance(scores, micro_batch((-1.0, 10)), WeightsConfig())
    assert printed.tolist() == pytest.approx([0.0] * 9 + [1 - 2 * sigmoid(-4.0)], abs=1e-6)
    assert released.tolist() == [0.0] * 10


def test_top_share_ranks_by_the_belief():
    scores = torch.tensor([3.0, -3.0, 4.0, -1.0])
    by_mean, by_token = (
        token_weighting.importance(scores, micro_batch((1.0, 4)), WeightsConfig(belief, "top_share", top_share=0.5))
        for belief in ("prefix_mean", "token")
    )
    assert (by_mean.tolist(), by_token.tolist()) == ([1, 0, 0, 0], [0, 0, 1, 0])


def dealt(seed: tuple[int, ...], parts: list) -> tuple[list[float], list[float]]:
    """Shuffled weights 0, 1, 2, ... of some micro-batches: those on correct and those on incorrect tokens."""
    lengths = [len(part.labels) for part in parts]
    weights = torch.arange(sum(lengths), dtype=torch.float32).split(lengths)
    result = token_weighting.shuffle(weights, Batch(tuple(parts), packing.counts([])), seed)
    assert [len(part) for part in result] == lengths
    correct = torch.cat([(part.reward > 0).repeat_interleave(part.action_offsets.diff()) for part in parts])
    flat = torch.cat(result)
    return flat[correct].tolist(), flat[~correct].tolist()


def test_shuffled_weights_stay_on_their_side_and_depend_on_seed_and_step():
    parts = [micro_batch((1.0, 30), (-1.0, 20)), micro_batch((-1.0, 25)), packing.micro_batch([])]
    right, wrong = dealt((0, 1, 0), parts)
    assert sorted(right) == list(range(30)) and sorted(wrong) == list(range(30, 75))
    assert right != sorted(right) and any(value >= 50 for value in wrong[:20]), "across micro-batches too"
    assert dealt((0, 1, 0), parts) == (right, wrong)
    assert len({tuple(dealt(seed, parts)[0]) for seed in ((0, 1, 0), (0, 2, 0), (1, 1, 0), (0, 1, 1))}) == 4


RULES = """
import torch

def steps_that_are_wrong(score_T, micro_batch, config):
    assert not score_T.requires_grad
    incorrect_T = (micro_batch.reward < 0).repeat_interleave(micro_batch.action_offsets.diff())
    return (~incorrect_T | (micro_batch.labels == 7)).double()

def one_number(score_T, micro_batch, config): return 1.0
def too_short(score_T, micro_batch, config): return score_T[:-1]
def negative(score_T, micro_batch, config): return score_T * 0 - 1
def two_arguments(score_T, micro_batch): return score_T
number = 3
"""


@pytest.fixture
def rule(tmp_path):
    (tmp_path / "rules.py").write_text(RULES)
    return lambda name: Config(weights=WeightsConfig(rule=f"{tmp_path}/rules.py:{name}"))


def test_a_rule_of_a_recipe_file_weighs_the_tokens(rule):
    config, batch = rule("steps_that_are_wrong"), micro_batch((1.0, 3), (-1.0, 4))
    weights = token_weighting.weight_rule(config)(torch.zeros(7, requires_grad=True), batch, config)
    assert weights.tolist() == [1, 1, 1, 0, 0, 1, 0] and weights.dtype == torch.float32
    default = Config()
    scores = torch.randn(7, generator=torch.Generator().manual_seed(1))
    weights = token_weighting.weight_rule(default)(scores, batch, default)
    assert torch.equal(weights, token_weighting.importance(scores, batch, default.weights))


def test_the_rule_in_the_documentation_works(tmp_path):
    page = (ROOT / "docs/how_to/token_weights.md").read_text()
    (tmp_path / "rules.py").write_text(page.split("```python\n")[1].split("```")[0])
    config = Config(weights=WeightsConfig(rule=f"{tmp_path}/rules.py:last_half"))
    weights = token_weighting.weight_rule(config)(torch.zeros(7), micro_batch((1.0, 3), (-1.0, 4)), config)
    assert weights.tolist() == [1, 1, 1, 0, 0, 1, 1]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("two_arguments", "a function of \\(score_T, micro_batch, config\\); with these 3 arguments: too many"),
        ("number", "rules.py has no function 'number'"),
        ("missing", "rules.py has no function 'missing'"),
        ("", "NAME is missing"),
    ],
)
def test_a_rule_that_cannot_be_called_is_bad_input(rule, name, says):
    with pytest.raises(ConfigError, match=says):
        token_weighting.weight_rule(rule(name))
    with pytest.raises(ConfigError, match="the file no.py does not exist"):
        token_weighting.weight_rule(Config(weights=WeightsConfig(rule="no.py:rule")))


@pytest.mark.parametrize(
    ("name", "says"),
    [("one_number", "returned float; expected"), ("too_short", r"shape \[6\]; .* \[7\]"), ("negative", "negative")],
)
def test_a_rule_that_returns_no_weights_stops_the_run(rule, name, says):
    config = rule(name)
    with pytest.raises(RunStopped, match=says):
        token_weighting.weight_rule(config)(torch.zeros(7), micro_batch((1.0, 3), (-1.0, 4)), config)


@pytest.mark.parametrize(("head_init", "spread"), [("zeros", 0.0), ("normal", 0.02)])
def test_the_head_starts_at_zero_unless_it_is_drawn(head_init, spread):
    """The authors' loader fills it with zeros; tests/dist/test_token_weights.py has Megatron's."""
    from oreal_megatron.mcore import trained_models
    from oreal_megatron.models import architecture

    arch = architecture.read(json.loads((ROOT / "tests/families.json").read_text())["Qwen2"])
    config = Config(reward_model=RewardModelConfig(head_init=head_init))
    read = trained_models._with_fresh_head(arch, config, lambda name: torch.ones(3))
    head = read("score.weight")
    assert head.shape == (1, arch.hidden) and head.std().item() == pytest.approx(spread, rel=0.3)
    assert torch.equal(read("model.norm.weight"), torch.ones(3)), "the layers are the policy's"

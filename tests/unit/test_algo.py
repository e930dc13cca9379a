"""Advantages, selection, token weights, packing, sampling, schedules: oracles, invariances, edges."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oreal_megatron.algo import advantages, packing, schedule, selection, token_weighting
from oreal_megatron.config import (
    Config,
    ConfigError,
    DataConfig,
    OptimizerConfig,
    RewardModelConfig,
    SelectionConfig,
    WeightsConfig,
)
from oreal_megatron.data import sampler
from oreal_megatron.observe.idle_steps import cause_of_idleness
from oreal_megatron.records import Counts, Outcome, Prompt, Rollout, Sample, Verdict

RIGHT, WRONG, UNKNOWN = Outcome.CORRECT, Outcome.INCORRECT, Outcome.UNKNOWN


def step_of(*rows: list[Outcome], tokens: tuple[int, ...] = (7, 8)):
    """Rollouts and verdicts of a step with these outcomes."""
    rollouts = [
        [Rollout(Prompt(p, "q", "1", None, (1, p + 10)), p, k, (*tokens, k), "", True) for k in range(len(row))]
        for p, row in enumerate(rows)
    ]
    return rollouts, [[Verdict(outcome, "exact") for outcome in row] for row in rows]


@given(st.lists(st.sampled_from([1.0, -1.0]), min_size=2, max_size=20))
def test_leave_one_out_sums_to_zero_and_is_each_against_the_mean_of_the_others(rewards):
    result = advantages.leave_one_out(rewards)
    assert sum(result) == pytest.approx(0, abs=1e-9)
    others = rewards[1:]
    assert result[0] == pytest.approx(rewards[0] - sum(others) / len(others))


def test_leave_one_out_on_plus_minus_one_is_twice_the_paper_s():
    result = advantages.leave_one_out([1, -1, -1, -1])
    assert result == pytest.approx([2.0, -2 / 3, -2 / 3, -2 / 3])


def test_group_normalised_by_hand():
    assert advantages.group_normalised([1, 1, -1, -1]) == pytest.approx(
        [math.sqrt(3) / 2] * 2 + [-math.sqrt(3) / 2] * 2
    )


def test_one_answer_has_no_others_and_equal_ones_no_difference():
    for kind in (advantages.leave_one_out, advantages.group_normalised):
        for count in range(20):
            assert kind([1.0] * count) == kind([-1.0] * count) == [0.0] * count
    assert advantages.KINDS["reward"]([1.0, -1.0, -1.0]) == [1.0, -1.0, -1.0]


def test_selection_drops_prompts_that_are_all_right_all_wrong_or_unknown():
    rollouts, verdicts = step_of([RIGHT] * 4, [WRONG] * 4, [UNKNOWN] * 4, [RIGHT, UNKNOWN, UNKNOWN, RIGHT])
    assert selection.samples(rollouts, verdicts, SelectionConfig(), (0, 0)) == []


def test_selection_keeps_one_right_and_one_wrong_with_advantages_over_all_known_answers():
    rollouts, verdicts = step_of([RIGHT, WRONG, WRONG, UNKNOWN, WRONG])
    right, wrong = selection.samples(rollouts, verdicts, SelectionConfig(), (0, 0))
    assert (right.reward, wrong.reward) == (1.0, -1.0)
    assert right.advantage == pytest.approx(2.0) and wrong.advantage == pytest.approx(-2 / 3)
    assert right.response_tokens == (7, 8, 0) and wrong.response_tokens[-1] in (1, 2, 4)


def test_all_keeps_prompts_without_signal_for_denominators_and_kl_as_the_released_run_without_reward_model():
    rollouts, verdicts = step_of([RIGHT] * 3, [WRONG, RIGHT], [WRONG, WRONG], [UNKNOWN, WRONG], [UNKNOWN, UNKNOWN])
    picked = {
        keep: selection.samples(rollouts, verdicts, SelectionConfig(keep=keep), (0, 0))
        for keep in ("pair", "mixed", "all")
    }
    assert [sample.prompt_tokens[1] - 10 for sample in picked["all"]] == [0, 0, 0, 1, 1, 2, 2, 3]
    assert [sample.advantage for sample in picked["all"]] == [0, 0, 0, -2, 2, 0, 0, 0]
    assert picked["mixed"] == picked["all"][3:5] and sorted(picked["pair"], key=lambda s: s.reward) == picked["mixed"]
    assert selection.counts(picked["all"]) == Counts(8, 24, 12, 12)  # 3 tokens each
    assert selection.counts(picked["mixed"]) == Counts(2, 6, 3, 3)
    for samples in picked.values():
        assert selection.summary(rollouts, verdicts, samples)["batch/mixed_prompts"] == 1


def test_reinforce_takes_the_reward_of_every_rollout():
    rollouts, verdicts = step_of([RIGHT] * 2, [WRONG, UNKNOWN], [WRONG, RIGHT])
    samples = selection.samples(rollouts, verdicts, SelectionConfig("reward", "all"), (0, 0))
    assert [(sample.reward, sample.advantage) for sample in samples] == [(r, r) for r in (1, 1, -1, -1, 1)]


def test_unknown_is_never_kept_nor_counted_as_wrong():
    rollouts, verdicts = step_of([RIGHT, RIGHT, WRONG, UNKNOWN])
    kept = selection.samples(rollouts, verdicts, SelectionConfig(keep="all"), (0, 0))
    assert [sample.response_tokens[-1] for sample in kept] == [0, 1, 2]
    metrics = selection.summary(rollouts, verdicts, kept)
    assert metrics["verify/unknown"] == 1 and metrics["reward/pass_rate"] == pytest.approx(2 / 3)


def test_means_over_no_known_verdict_are_absent():
    metrics = selection.summary(*step_of([UNKNOWN, UNKNOWN]), [])
    assert metrics["verify/unknown"] == 2 and not {"reward/mean", "reward/pass_rate"} & metrics.keys()
    assert "(0% truncated, 2 unknown)" in cause_of_idleness(metrics)


def test_the_choice_depends_on_the_seed_and_on_its_own_prompt_only():
    mixed = [RIGHT] * 8 + [WRONG] * 8
    alone = selection.samples(*step_of([WRONG] * 16, mixed), SelectionConfig(), (5, 9))
    together = selection.samples(*step_of(mixed, mixed), SelectionConfig(), (5, 9))
    assert together[2:] == alone
    chosen = {selection.samples(*step_of(mixed), SelectionConfig(), (5, step))[0].response_tokens for step in range(40)}
    assert len(chosen) > 4


@pytest.mark.parametrize("outcomes", [[RIGHT, WRONG], [WRONG, RIGHT]])
def test_a_pair_is_both_sides_or_none(outcomes):
    """An empty response cannot be trained on, and its partner alone is no pair."""
    rollouts, verdicts = step_of([*outcomes, outcomes[1]])
    empty = Rollout(rollouts[0][1].prompt, 0, 1, (), "", False)
    assert selection.samples([[rollouts[0][0], empty]], [verdicts[0][:2]], SelectionConfig(), (0, 0)) == []
    pair = selection.samples([[rollouts[0][0], empty, rollouts[0][2]]], verdicts, SelectionConfig(), (0, 0))
    assert sorted(sample.response_tokens[-1] for sample in pair) == [0, 2]


def test_counts_of_the_step():
    samples = [Sample((1,), (2, 3), 1.0, 1.0), Sample((1,), (4, 5, 6), -1.0, -1.0)]
    assert selection.counts(samples) == Counts(2, 5, 2, 3)


def test_weights_are_eq_10_of_the_running_mean_and_stop_no_gradient_through():
    batch = packing.micro_batch([Sample((1,), (2, 3), 1.0, 1.0), Sample((1,), (4, 5), -1.0, -1.0)])
    score = torch.tensor([1.0, 3.0, 1.0, -5.0], requires_grad=True)

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    expected = [2 * sigmoid(1) - 1, 2 * sigmoid(2) - 1, 0.0, 1 - 2 * sigmoid(-2)]
    result = token_weighting.importance(score, batch, WeightsConfig())
    assert result.tolist() == pytest.approx(expected, abs=1e-6) and not result.requires_grad


def test_top_share_spreads_the_best_tokens_over_zero_to_one():
    batch = packing.micro_batch([Sample((1,), (2, 3, 4, 5), 1.0, 1.0)])
    score = torch.tensor([4.0, -4.0, -4.0, -4.0])
    half = token_weighting.importance(score, batch, WeightsConfig(rescale="top_share", top_share=0.5))
    assert sorted(half.tolist()) == [0.0, 0.0, 0.0, 1.0] and half[0] == 1
    even = token_weighting.importance(torch.zeros(4), batch, WeightsConfig(rescale="top_share", top_share=0.5))
    assert even.sum() == 2


@pytest.mark.parametrize("share", [0.001, 0.05, 0.25, 1.0])
@pytest.mark.parametrize("lengths", [(1,), (3, 1, 12), (1, 40)])
def test_the_top_share_of_a_response_is_at_least_one_token(lengths, share):
    batch = packing.micro_batch([Sample((1,), (2,) * length, 1.0, 1.0) for length in lengths])
    score = torch.randn(sum(lengths), generator=torch.Generator().manual_seed(0))
    weight = token_weighting.importance(score, batch, WeightsConfig(rescale="top_share", top_share=share))
    for part in weight.split(lengths):
        assert part.max() == 1 and (part > 0).sum() <= max(int(len(part) * share), 1)


def prompts(*rates: float | None) -> list[Prompt]:
    return [Prompt(i, str(i), "1", rate, (1,)) for i, rate in enumerate(rates)]


def test_an_epoch_repeats_prompts_by_their_bucket():
    data = DataConfig(prompts_per_step=17)
    taken = sampler.balanced(prompts(0.1, 0.25, 0.5, 0.7, 0.8, 1.0, None), data, seed=1).take(0)
    assert Counter(prompt.id for prompt in taken) == {0: 6, 1: 4, 2: 4, 3: 2, 6: 1}


def test_the_sampler_is_a_function_of_the_step_and_covers_each_epoch():
    one, other = (sampler.Sampler(range(10), 4, seed=3) for _ in range(2))
    later = [other.take(step) for step in (4, 3, 2, 1, 0)][::-1]
    taken = [one.take(step) for step in range(5)]
    assert taken == later
    flat = [item for step in taken for item in step]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10)) and flat[:10] != flat[10:]


def test_no_prompt_in_any_bucket_is_bad_input():
    with pytest.raises(ConfigError, match="none of the 2 prompts"):
        sampler.balanced(prompts(0.9, 1.0), DataConfig(), seed=0)


def authors_rates(steps: int, warmup: int, lr: float, min_lr: float) -> list[float]:
    """Return the rates of InternLM/OREAL's schedulers, which it steps at the start of every step, frozen or not."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    first = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda x: x / warmup if x < warmup else 1)
    second = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps - warmup, eta_min=min_lr)
    rates = []
    for step in range(steps):
        optimizer.step()
        (first if step <= warmup else second).step()
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


@pytest.mark.parametrize(("kind", "first", "last"), [("steps", 1.0, 0.2), ("updates", 0.1, 0.2)])
def test_the_policy_s_warm_up_runs_in_the_frozen_steps_or_after_them(kind, first, last):
    """By the authors' rule the rates are those of a schedule over all steps; the frozen ones are passed over."""
    optimizer = OptimizerConfig(lr=1.0, min_lr=0.2, warmup_steps=10)
    config = Config(steps=90, policy_freeze_steps=10, policy_schedule=kind, optimizer=optimizer)
    rates = [schedule.policy_rate(update, config) for update in range(80)]
    assert (rates[0], rates[-1]) == (pytest.approx(first), pytest.approx(last))
    released = authors_rates(90, warmup=10, lr=1.0, min_lr=0.2)[10:]
    within = all(abs(own / other - 1) < 0.028 for own, other in zip(rates, released, strict=True))
    assert within == (kind == "steps")
    without = dataclasses.replace(config, reward_model=RewardModelConfig(enabled=False))
    assert schedule.policy_rate(0, without) == pytest.approx(0.1), "nothing is frozen without a reward model"


def test_warm_up_then_cosine():
    optimizer = OptimizerConfig(lr=1.0, min_lr=0.2, warmup_steps=4)
    rates = [schedule.learning_rate(update, 24, optimizer) for update in range(24)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates[-1] == pytest.approx(0.2) and rates[13] == pytest.approx(0.6, abs=0.05)
    assert all(later < earlier for earlier, later in zip(rates[4:], rates[5:], strict=False))

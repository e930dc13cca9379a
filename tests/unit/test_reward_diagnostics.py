"""AUC, calibration bins and weight shares of the reward model; the warning about a muted side."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oreal_megatron import config as c
from oreal_megatron.algo import packing, reward_diagnostics, selection, token_weighting
from oreal_megatron.observe import dumps
from oreal_megatron.observe.metrics_log import MetricsLog
from oreal_megatron.observe.weight_balance import WeightBalance
from oreal_megatron.records import PackingSpec, Sample, ScoredRollout, TokenWeights

ROLLOUTS = st.lists(
    st.builds(
        ScoredRollout,
        slot=st.integers(0, 3),
        index=st.integers(0, 9),
        correct=st.booleans(),
        # Nearer to 0 than this, the belief rounds to 0.5, which is a bin's edge.
        score=st.sampled_from([-2.0, -0.5, 0.0, 0.5, 2.0]) | st.floats(-800, -1e-15) | st.floats(1e-15, 800),
    ),
    max_size=30,
)


def share_of_ordered_pairs(rollouts: list[ScoredRollout]) -> float | None:
    pairs = [
        (high.score > low.score) + (high.score == low.score) / 2
        for high, low in itertools.product(rollouts, rollouts)
        if high.correct and not low.correct
    ]
    return sum(pairs) / len(pairs) if pairs else None


@given(ROLLOUTS)
def test_auc_is_the_share_of_ordered_pairs_with_ties_shared(rollouts):
    expected = share_of_ordered_pairs(rollouts)
    assert reward_diagnostics.auc(rollouts) == (expected if expected is None else pytest.approx(expected))


@given(ROLLOUTS)
def test_swapped_outcomes_mirror_auc_and_a_monotone_map_of_scores_keeps_it(rollouts):
    value = reward_diagnostics.auc(rollouts)
    swapped = [ScoredRollout(r.slot, r.index, not r.correct, r.score) for r in rollouts]
    scaled = [ScoredRollout(r.slot, r.index, r.correct, 4 * r.score) for r in rollouts]
    if value is not None:
        assert reward_diagnostics.auc(swapped) == pytest.approx(1 - value)
        assert reward_diagnostics.auc(scaled) == pytest.approx(value)


@given(ROLLOUTS)
def test_correct_above_incorrect_is_the_mean_over_prompts(rollouts):
    values = [share_of_ordered_pairs([r for r in rollouts if r.slot == slot]) for slot in range(4)]
    known = [value for value in values if value is not None]
    expected = pytest.approx(sum(known) / len(known)) if known else None
    assert reward_diagnostics.auc_within_prompts(rollouts) == expected


def test_difficulty_of_prompts_moves_auc_but_not_the_comparison_within_prompts():
    easy = [ScoredRollout(0, k, k > 0, 5.0) for k in range(8)]
    hard = [ScoredRollout(1, k, k == 0, -5.0) for k in range(8)]
    figures = reward_diagnostics.metrics(easy + hard)
    assert figures["reward_model/auc"] > 0.8 and figures["reward_model/correct_above_incorrect"] == 0.5
    assert reward_diagnostics.metrics(easy[1:]) == {}, "one outcome only: neither figure exists"


@given(ROLLOUTS)
def test_each_rollout_is_in_the_calibration_bin_of_its_belief(rollouts):
    bins = reward_diagnostics.calibration(rollouts)
    for number in range(reward_diagnostics.BINS):
        inside = [
            rollout
            for rollout in rollouts
            if number == min(int(torch.tensor(rollout.score, dtype=torch.float64).sigmoid() * 10), 9)
        ]
        assert bins.counts[number] == len(inside) and bins.correct[number] == sum(r.correct for r in inside)


def test_the_score_of_a_rollout_is_the_mean_of_its_tokens_however_they_are_packed(make_samples):
    samples = make_samples(9, seed=4)
    table = {sample.rollout: 0.25 * n - 2 for n, sample in enumerate(samples)}

    def scored(budget: int, ranks: int) -> list[ScoredRollout]:
        result = []
        for rank in range(ranks):
            for part in packing.batch(samples, PackingSpec(budget, rank, ranks, token_multiple=4)).micro_batches:
                values = [table.get(tuple(key), 0.0) for key in part.rollouts.tolist()]
                lengths = part.action_offsets.diff().tolist()
                ramps = [
                    torch.full((n,), v) + torch.linspace(-1, 1, n) * (n > 1)
                    for v, n in zip(values, lengths, strict=True)
                ]
                result += reward_diagnostics.scored_rollouts(torch.cat(ramps), part)
        return sorted(result, key=lambda r: (r.slot, r.index))

    expected = [(*s.rollout, s.reward > 0, pytest.approx(table[s.rollout], abs=1e-6)) for s in samples]
    for budget, ranks in ((1, 1), (40, 1), (1000, 1), (40, 3)):
        assert [(r.slot, r.index, r.correct, r.score) for r in scored(budget, ranks)] == expected


def test_an_empty_response_and_filler_are_not_scored():
    part = packing.micro_batch([Sample((1, 2), (), 1.0, 1.0, rollout=(0, 0)), Sample((1,), (5,), -1.0, -1.0)], 8)
    assert reward_diagnostics.scored_rollouts(torch.tensor([3.0]), part) == [ScoredRollout(-1, -1, False, 3.0)]
    empty = packing.micro_batch([], 8)
    assert reward_diagnostics.scored_rollouts(torch.empty(0), empty) == []


def test_selected_samples_name_their_rollouts():
    from oreal_megatron.records import Outcome, Prompt, Rollout, Verdict

    rows = [[Rollout(Prompt(5, "q", "1", None, (1,)), 3, k, (k,), "", True) for k in range(4)]]
    verdicts = [[Verdict(Outcome.CORRECT if k == 2 else Outcome.INCORRECT, "exact") for k in range(4)]]
    correct, incorrect = selection.samples(rows, verdicts, c.SelectionConfig(), (0, 0))
    assert correct.rollout == (3, 2) and incorrect.rollout == (3, incorrect.response_tokens[0])


def test_weight_metrics_are_shares_of_the_step_s_tokens_of_each_side(make_samples):
    samples = make_samples(6, seed=2)
    spec = PackingSpec(30)
    parts = packing.batch(samples, spec).micro_batches
    counts = selection.counts(samples)
    generator = torch.Generator().manual_seed(0)
    weights = [(torch.rand(len(p.labels), generator=generator) - 0.4).clamp(min=0) for p in parts]
    totals: dict[str, float] = {}
    for weight_T, part in zip(weights, parts, strict=True):
        for name, value in token_weighting.metrics(weight_T, part, counts).items():
            totals[name] = totals.get(name, 0.0) + float(value)
    for side, sign in (("correct", 1.0), ("incorrect", -1.0)):
        own = [
            float(w)
            for weight_T, part in zip(weights, parts, strict=True)
            for n, reward in enumerate(part.reward.tolist())
            for w in weight_T[part.action_offsets[n] : part.action_offsets[n + 1]]
            if reward == sign
        ]
        assert totals[f"weights/{side}_mean"] == pytest.approx(sum(own) / len(own))
        assert totals[f"weights/{side}_zero_share"] == pytest.approx(own.count(0.0) / len(own))


@pytest.mark.parametrize(("sign", "side"), [(1.0, "correct"), (-1.0, "incorrect")])
def test_a_side_without_tokens_has_no_mean_weight(make_samples, sign, side):
    samples = [sample for sample in make_samples(4) if sample.reward == sign]
    batch, counts = packing.micro_batch(samples), selection.counts(samples)
    metrics = token_weighting.metrics(torch.zeros(len(batch.labels)), batch, counts)
    assert metrics == {f"weights/{side}_mean": 0.0, f"weights/{side}_zero_share": 1.0}


def weights_of(correct: float, incorrect: float, zero_shares: tuple[float, float] = (0.3, 0.3)) -> dict[str, float]:
    means = {"weights/correct_mean": correct, "weights/incorrect_mean": incorrect}
    return means | dict(zip(("weights/correct_zero_share", "weights/incorrect_zero_share"), zero_shares, strict=True))


def warnings_of(pairs: list[tuple[float, float]]) -> list[int]:
    """Steps at which a warning is given, for these means of correct and incorrect weights."""
    balance = WeightBalance()
    steps = []
    for step, (correct, incorrect) in enumerate(pairs):
        if balance.warning(weights_of(correct, incorrect)):
            steps.append(step)
    return steps


@pytest.mark.parametrize("swap", [False, True])
def test_a_muted_side_is_reported_once_per_stretch(swap):
    pairs = [(0.0, 0.0), (0.0, 0.004), (0.3, 0.2), (0.3, 0.02), (0.3, 0.04), (0.3, 0.01), (0.3, 0.2), (0.3, 0.02)]
    assert warnings_of([pair[::-1] if swap else pair for pair in pairs]) == [3, 7]


def test_a_change_of_the_muted_side_is_a_stretch_of_its_own():
    assert warnings_of([(0.5, 0.01), (0.01, 0.5), (0.01, 0.5)]) == [0, 1]
    message = WeightBalance().warning(weights_of(0.5, 0.01))
    assert "mutes incorrect samples: their mean token weight is 0.01, that of correct ones 0.5" in message


@pytest.mark.parametrize(
    "metrics",
    [
        {},
        {"weights/correct_mean": 0.0, "weights/incorrect_mean": 1.0},  # no reward model, no correct sample
        {name: value for name, value in weights_of(0.0, 0.5).items() if "/correct_" not in name},  # no correct sample
    ],
)
def test_a_side_without_tokens_and_a_run_without_reward_model_are_not_muted(metrics):
    assert WeightBalance().warning(metrics) == ""


def test_dumps_keep_scores_and_rollouts_and_older_ones_are_read(tmp_path, make_samples):
    from safetensors.torch import load_file, save_file

    batch = packing.batch(make_samples(4), PackingSpec(40))
    scores = [torch.randn(len(part.labels)) for part in batch.micro_batches]
    weights = TokenWeights([score.sigmoid() for score in scores], scores=scores)
    folder = tmp_path / "step_000000"
    dumps.write_dump(folder, 0, (0, 1), batch, None, weights, {}, c.Config())
    share = dumps.read_dump(folder).share(0, 1)
    assert all(map(torch.equal, share.token_weights.scores, scores))
    assert torch.equal(share.batch.micro_batches[0].rollouts, batch.micro_batches[0].rollouts)

    file = folder / "share_000.safetensors"
    save_file({name: v for name, v in load_file(file).items() if not name.endswith(("/score", "/rollouts"))}, file)
    old = dumps.read_dump(folder).share(0, 1)
    assert old.token_weights.scores == [] and old.token_weights.valid
    assert (old.batch.micro_batches[0].rollouts == -1).all()


def test_calibration_rows_of_repeated_steps_are_replaced(tmp_path):
    rollouts = [ScoredRollout(0, 0, True, math.log(3)), ScoredRollout(0, 1, False, -30.0)]
    log = MetricsLog(tmp_path)
    for step in range(3):
        log.log_calibration(step, reward_diagnostics.calibration(rollouts))
    MetricsLog(tmp_path, 2).log_calibration(2, reward_diagnostics.calibration(rollouts[:1]))
    rows = [json.loads(line) for line in (tmp_path / "calibration.jsonl").read_text().splitlines()]
    assert [(row["step"], sum(row["counts"])) for row in rows] == [(0, 2), (1, 2), (2, 1)]
    assert rows[0]["counts"] == [1, 0, 0, 0, 0, 0, 0, 1, 0, 0] and rows[0]["correct"] == [0] * 7 + [1, 0, 0]

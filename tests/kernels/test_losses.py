"""Token weights and losses against the formulas written token by token in plain Python floats."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from oreal_kernels import SUMS, LossTerms, oreal_loss, reward_loss, token_weights
from oreal_kernels.policy_loss import KL_KINDS, policy_terms
from oreal_kernels.reward_model_loss import reference as reward_loss_reference
from oreal_kernels.scores_to_weights import BELIEFS

LENGTHS = [70, 0, 1, 130, 64, 5]
REWARD = torch.tensor([1.0, -1.0, -1.0, -1.0, 1.0, 1.0])
CU_SEQLENS = torch.tensor([0, *LENGTHS]).cumsum(0)
T = int(CU_SEQLENS[-1])


def random(n: int = T, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def spans():
    return zip(CU_SEQLENS[:-1].tolist(), CU_SEQLENS[1:].tolist(), REWARD.tolist(), strict=True)


def weights_by_hand(
    scores: list[float], thresholds: tuple[float, float], belief_of: str
) -> tuple[list[float], list[float]]:
    weights, means = [], []
    for first, stop, outcome in spans():
        total, threshold = 0.0, thresholds[0 if outcome > 0 else 1]
        for t in range(first, stop):
            total += scores[t]
            belief = 1 / (1 + math.exp(-(total / (t - first + 1) if belief_of == "prefix_mean" else scores[t])))
            merit = belief if outcome > 0 else 1 - belief
            weights.append(min(max((merit - threshold) / (1 - threshold), 0.0), 1.0))
        means.append(total / max(stop - first, 1))
    return weights, means


@pytest.mark.parametrize("belief", BELIEFS)
@pytest.mark.parametrize("thresholds", [(0.0, 0.0), (0.25, 0.5), (0.5, 0.25), (0.9, 0.0)])
def test_token_weights(thresholds, belief, served_by):
    scores = random() * 3
    weights, means = token_weights(scores, CU_SEQLENS, REWARD > 0, thresholds, belief)
    expected_weights, expected_means = weights_by_hand(scores.double().tolist(), thresholds, belief)
    torch.testing.assert_close(weights, torch.tensor(expected_weights), rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(means, torch.tensor(expected_means), rtol=1e-5, atol=1e-6)


def test_running_means_of_long_responses_keep_their_digits(served_by):
    """A bf16 running sum, as in the authors' code, stops growing at some hundred tokens; ours does not."""
    scores = (random(14000, seed=3) * 0.5 + 0.3).bfloat16()
    cu_seqlens, correct = torch.tensor([0, 14000]), torch.tensor([True])
    given = scores.float() if served_by == "triton" else scores  # Triton's interpreter reads bf16 wrongly
    weights, means = token_weights(given, cu_seqlens, correct, (0.0, 0.0))
    exact = scores.double().cumsum(0) / torch.arange(1, 14001)
    torch.testing.assert_close(weights.double(), torch.sigmoid(exact), rtol=0, atol=1e-6)
    drifted = torch.zeros((), dtype=torch.bfloat16)
    for score in scores:
        drifted = drifted + score
    assert abs(drifted.item() / 14000 - exact[-1].item()) > 0.05, "what is avoided"
    assert abs(means.item() - exact[-1].item()) < 1e-6


def terms_of(**changes) -> LossTerms:
    terms = LossTerms(
        reference_logp=random(seed=1) - 2,
        weight=torch.rand(T, generator=torch.Generator().manual_seed(2)),
        cu_seqlens=CU_SEQLENS,
        reward=REWARD,
        advantage=torch.tensor([0.2, -1.0, -0.4, -1.6, 1.8, 0.6]),
        correct_tokens=200,
        incorrect_tokens=131,
        action_tokens=331,
        positive_coef=1.0,
        negative_coef=0.5,
        kl_coef=0.3,
        kl_kind="k3",
        advantage_on_positives=True,
    )
    return replace(terms, **changes)


def by_hand(logp: list[float], terms: LossTerms) -> tuple[float, list[float], dict[str, float]]:
    """Loss, slope of each token and sums."""
    loss, slopes, sums = 0.0, [], dict.fromkeys(SUMS, 0.0)
    for (first, stop, outcome), advantage in zip(spans(), terms.advantage.tolist(), strict=True):
        for t in range(first, stop):
            weight, d = terms.weight[t].item(), terms.reference_logp[t].item() - logp[t]
            if outcome > 0:
                merit = weight * (advantage if terms.advantage_on_positives else 1.0)
                loss -= terms.positive_coef * merit * logp[t] / terms.correct_tokens
                slope = -terms.positive_coef * merit / terms.correct_tokens
                sums["correct"] += merit * logp[t]
            else:
                if terms.ratio_cap:
                    weight *= ratio_by_hand(logp[t], terms.behaviour_logp[t].item(), terms.ratio_cap)
                loss -= terms.negative_coef * weight * advantage / terms.incorrect_tokens
                slope = -terms.negative_coef * weight * advantage / terms.incorrect_tokens
                sums["incorrect"] += weight * advantage
            sums["correct_weight" if outcome > 0 else "incorrect_weight"] += weight
            sums["logp"] += logp[t]
            kinds = {"k1": -d, "k1_reversed": d, "k2": d * d / 2, "k3": math.expm1(d) - d}
            steep = {"k1": 1.0, "k1_reversed": -1.0, "k2": -d, "k3": -math.expm1(d)}
            for name in ("k1", "k2", "k3"):
                sums[name] += kinds[name]
            loss += terms.kl_coef * kinds[terms.kl_kind] / terms.action_tokens
            slopes.append(slope + terms.kl_coef * steep[terms.kl_kind] / terms.action_tokens)
    return loss, slopes, sums


@pytest.mark.parametrize("kl_kind", KL_KINDS)
@pytest.mark.parametrize("advantage_on_positives", [True, False])
def test_oreal_loss_its_slopes_and_sums(kl_kind, advantage_on_positives, served_by):
    terms = terms_of(kl_kind=kl_kind, advantage_on_positives=advantage_on_positives)
    logp = (random(seed=4) - 2).requires_grad_()
    loss, sums = oreal_loss(logp, terms)
    (loss * 2).backward()
    expected_loss, expected_slopes, expected_sums = by_hand(logp.double().tolist(), terms)
    torch.testing.assert_close(loss.item(), expected_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logp.grad / 2, torch.tensor(expected_slopes), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(dict(zip(SUMS, sums.tolist(), strict=True)), expected_sums, rtol=1e-5, atol=1e-4)


def ratio_by_hand(logp: float, behaviour: float, cap: float) -> float:
    return 1.0 if math.isnan(behaviour) else math.exp(min(logp - behaviour, math.log(cap)))


def behaviour_of(logp: torch.Tensor) -> torch.Tensor:
    """Log-probs far below, near and far above the policy's, in sequences of both outcomes; some are unknown."""
    behaviour = logp.detach() + random(seed=6).to(logp.dtype)
    behaviour[::7] = math.nan
    behaviour[1::50] -= 200.0
    behaviour[2::50] += 200.0
    return behaviour


@pytest.mark.parametrize("cap", [1.0, 2.0])
def test_incorrect_tokens_are_weighted_by_the_truncated_ratio(cap, served_by):
    logp = (random(seed=4) - 2).requires_grad_()
    terms = terms_of(behaviour_logp=behaviour_of(logp), ratio_cap=cap)
    loss, sums = oreal_loss(logp, terms)
    loss.backward()
    expected_loss, expected_slopes, expected_sums = by_hand(logp.double().tolist(), terms)
    torch.testing.assert_close(loss.item(), expected_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logp.grad, torch.tensor(expected_slopes), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(dict(zip(SUMS, sums.tolist(), strict=True)), expected_sums, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("behaviour", ["own", "unknown"])
def test_a_policy_that_sampled_its_tokens_has_the_loss_without_ratio(behaviour, served_by):
    """Bit for bit: a ratio of 1 changes nothing."""
    logp = random(seed=4) - 2
    behaviour_logp = logp.clone() if behaviour == "own" else torch.full_like(logp, math.nan)
    plain = policy_terms(logp, terms_of())
    for result, expected in zip(
        policy_terms(logp, terms_of(behaviour_logp=behaviour_logp, ratio_cap=2.0)), plain, strict=True
    ):
        assert torch.equal(result, expected)


@pytest.mark.parametrize("kl_kind", KL_KINDS)
def test_slopes_equal_finite_differences_of_the_loss(kl_kind):
    """In fp64 through the reference; the negative term's ratio has value 1 and its slope is checked by hand above."""
    terms = terms_of(kl_kind=kl_kind, negative_coef=0.0)
    logp = (random(seed=4) - 2).double()
    slope, _ = policy_terms(logp, terms)
    for token in (0, 69, 70, 71, 150, T - 1):
        step = torch.zeros_like(logp)
        step[token] = 1e-6
        high, low = (oreal_loss_in_fp64(logp + sign * step, terms) for sign in (1, -1))
        assert slope[token].item() == pytest.approx((high - low) / 2e-6, rel=1e-5, abs=1e-9)


def oreal_loss_in_fp64(logp: torch.Tensor, terms: LossTerms) -> float:
    correct_scale, incorrect_scale, kl_scale = terms.scales
    sums = dict(zip(SUMS, policy_terms(logp, terms)[1].tolist(), strict=True))
    kl = {"k1": sums["k1"], "k1_reversed": -sums["k1"], "k2": sums["k2"], "k3": sums["k3"]}[terms.kl_kind]
    return -correct_scale * sums["correct"] - incorrect_scale * sums["incorrect"] + kl_scale * kl


@pytest.mark.parametrize("distance", [50.0, -50.0, 1000.0, -1000.0, 1e-5])
def test_far_and_near_references(distance, served_by):
    terms = terms_of()
    logp = (random(seed=4) - 2).requires_grad_()
    terms = replace(terms, reference_logp=logp.detach() + distance)
    loss, sums = oreal_loss(logp, terms)
    loss.backward()
    assert loss.isfinite() and logp.grad.isfinite().all()
    d = max(min(distance, 60.0), -60.0)
    rounding = (terms.reference_logp.double() - logp.detach().double() - distance).abs().max().item()
    expected = T * (math.expm1(d) - d)
    room = T * abs(math.expm1(d)) * rounding
    assert sums[SUMS.index("k3")].item() == pytest.approx(expected, rel=1e-4, abs=room)


@pytest.mark.parametrize("d", [1e-5, -1e-5, 0.02, -0.04, 1.0])
def test_the_slope_of_k3_keeps_its_digits_near_zero(d, served_by):
    terms = terms_of(positive_coef=0.0, negative_coef=0.0, kl_coef=331.0, reference_logp=torch.full((T,), d))
    slope, sums = policy_terms(torch.zeros(T), terms)
    exact = terms.reference_logp.double()
    near = 1e-7 if served_by == "reference" else 0  # torch differentiates expm1(d) - d as exp(d) - 1
    torch.testing.assert_close(slope.double(), -torch.expm1(exact), rtol=1e-5, atol=near)
    expected = (torch.expm1(exact) - exact).sum().item()
    assert sums[SUMS.index("k3")].item() == pytest.approx(expected, rel=1e-3 if served_by == "reference" else 1e-4)


def test_any_cut_adds_up(served_by):
    logp = random(seed=4) - 2
    terms = terms_of(behaviour_logp=behaviour_of(logp), ratio_cap=2.0)
    slope, sums = policy_terms(logp, terms)
    pieces = [slice(0, 50), slice(50, 71), slice(71, 71), slice(71, T)]
    parts = [policy_terms(logp[piece], terms.select(piece)) for piece in pieces]
    torch.testing.assert_close(torch.cat([part for part, _ in parts]), slope, rtol=1e-6, atol=0)
    torch.testing.assert_close(sum(more for _, more in parts), sums, rtol=1e-6, atol=1e-5)


def test_sequences_may_be_permuted(served_by):
    order = [4, 2, 0, 5, 1, 3]
    pieces = [slice(first, stop) for first, stop, _ in spans()]
    terms, logp, scores = terms_of(), random(seed=4) - 2, random(seed=6)

    def shuffled(values):
        return torch.cat([values[pieces[i]] for i in order])

    mixed = replace(
        terms,
        reference_logp=shuffled(terms.reference_logp),
        weight=shuffled(terms.weight),
        cu_seqlens=torch.tensor([0, *(LENGTHS[i] for i in order)]).cumsum(0),
        reward=REWARD[order],
        advantage=terms.advantage[order],
    )
    torch.testing.assert_close(policy_terms(shuffled(logp), mixed)[0], shuffled(policy_terms(logp, terms)[0]))
    weights, means = token_weights(scores, CU_SEQLENS, REWARD > 0, (0.5, 0.3))
    again, means_again = token_weights(shuffled(scores), mixed.cu_seqlens, mixed.reward > 0, (0.5, 0.3))
    torch.testing.assert_close(again, shuffled(weights), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(means_again, means[order])


def test_the_same_bits_in_every_run(served_by):
    terms, logp = terms_of(), random(seed=4) - 2
    for one, two in zip(policy_terms(logp, terms), policy_terms(logp, terms), strict=True):
        assert torch.equal(one, two)


def test_reward_loss(served_by):
    outcome = REWARD.clone()
    outcome[4] = 0  # a filler without an answer
    scores = (random(seed=8) * 2).requires_grad_()
    loss, hits = reward_loss(scores, CU_SEQLENS, outcome, 7)
    (slope,) = torch.autograd.grad(loss * 3, scores)
    exact = scores.detach().double().requires_grad_()
    expected, expected_hits = reward_loss_reference(exact, CU_SEQLENS, outcome.double(), 7)
    (expected_slope,) = torch.autograd.grad(expected * 3, exact)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(hits.double(), expected_hits)
    torch.testing.assert_close(slope.double(), expected_slope, rtol=1e-5, atol=1e-9)


def test_nothing_at_all(served_by):
    nothing, cu_seqlens = torch.zeros(0, requires_grad=True), torch.tensor([0, 0])
    terms = terms_of(
        reference_logp=torch.zeros(0),
        weight=torch.zeros(0),
        cu_seqlens=cu_seqlens,
        reward=torch.zeros(1),
        advantage=torch.zeros(1),
    )
    for loss, _ in (oreal_loss(nothing, terms), reward_loss(nothing, cu_seqlens, torch.zeros(1), 4)):
        assert loss.item() == 0
        loss.backward()
    weights, means = token_weights(nothing, cu_seqlens, torch.tensor([False]), (0.5, 0.5))
    assert weights.shape == (0,) and means.tolist() == [0.0]


def test_an_unknown_kl_is_refused():
    with pytest.raises(ValueError, match="kl_kind is 'k4'; expected one of k1"):
        terms_of(kl_kind="k4")

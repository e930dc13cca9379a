"""Losses of policy and reward model (arXiv 2502.06781, Eq. 11 and 12).

Each is a plain sum over one micro-batch, divided by counts of the whole step, so that micro-batches and data-parallel
ranks add up.

    correct samples:    - positive_coef  sum_t w_t A log pi(a_t) / correct tokens      behaviour cloning (first term)
    incorrect samples:  - negative_coef  sum_t w_t A r_t / incorrect tokens            policy gradient (second term)
    all samples:          kl_coef        sum_t KL(d_t) / action tokens                 d = log reference - log pi
    all samples:        - entropy_coef   sum_t H_t / action tokens                     entropy over the vocabulary

The ratio r is 1, or with ratio_cap min(pi / pi of the engine, cap), without gradient (algo/importance.py).
With normalise="joint" the first two are divided by all action tokens, as in REINFORCE.
KL(d) estimates KL(pi || reference) in nats from a sampled token: k1 is -d; k1_reversed d, the sign of the authors'
"kl", which raises the log-prob of every sampled token; k2 d^2 / 2; k3 exp(d) - d - 1, never negative.

Where the authors' released code differs from the paper we follow the code, which gave the published results: rewards
are +1 and -1, the imitation term is multiplied by the advantage, the negative term's ratio r = exp(logp -
logp.detach()) is identically 1, and the KL is taken to the fixed SFT reference, over all action
tokens of correct and incorrect samples. The arithmetic is in oreal_kernels; this module turns the step's records into
its terms, and its sums into metrics.
"""

from __future__ import annotations

import oreal_kernels
from torch import Tensor

from oreal_megatron.algo import importance
from oreal_megatron.config import Config, LossConfig
from oreal_megatron.records import Counts, MicroBatch


def terms(
    reference_logp_T: Tensor, weight_T: Tensor, micro_batch: MicroBatch, counts: Counts, config: LossConfig
) -> oreal_kernels.LossTerms:
    """Return everything in a micro-batch's loss but the policy's log-probs."""
    correct_tokens, incorrect_tokens = denominators(counts, config)
    return oreal_kernels.LossTerms(
        reference_logp=reference_logp_T,
        weight=weight_T,
        cu_seqlens=micro_batch.action_offsets,
        reward=micro_batch.reward,
        advantage=micro_batch.advantage,
        correct_tokens=correct_tokens,
        incorrect_tokens=incorrect_tokens,
        action_tokens=counts.action_tokens,
        positive_coef=config.positive_coef,
        negative_coef=config.negative_coef,
        kl_coef=config.kl_coef,
        kl_kind=config.kl_kind,
        advantage_on_positives=config.advantage_on_positives,
        behaviour_logp=importance.behaviour_logp(micro_batch, config),
        ratio_cap=config.ratio_cap,
        entropy_coef=config.entropy_coef,
    )


def denominators(counts: Counts, config: LossConfig) -> tuple[int, int]:
    """Return the divisors of the correct and the incorrect samples' term: its own tokens, or all tokens."""
    if config.normalise == "joint":
        return counts.action_tokens, counts.action_tokens
    return counts.correct_tokens, counts.incorrect_tokens


def metric_tokens(counts: Counts, config: LossConfig) -> dict[str, int]:
    """Return the number of tokens behind each metric of an update that is a mean over tokens."""
    correct, incorrect = denominators(counts, config)
    of_all = ("loss/kl", "policy/reference_kl", "policy/entropy_estimate", "policy/entropy")
    of_incorrect = ("weights/incorrect_mean", "policy/ratio_mean", "policy/ratio_capped_share")
    return {
        "loss/positive": correct,
        "loss/negative": incorrect,
        "weights/correct_mean": counts.correct_tokens,
        **dict.fromkeys(of_incorrect, counts.incorrect_tokens),
        **dict.fromkeys(of_all, counts.action_tokens),
    }


def metrics(total: Tensor, sums: Tensor, counts: Counts, config: LossConfig) -> dict[str, Tensor]:
    """Return the parts of the loss and further metrics of an update; they add up over micro-batches.

    A mean over no tokens is absent.
    """
    sum_of = dict(zip(oreal_kernels.SUMS, sums, strict=True))
    sum_of_metric = {
        "loss/positive": -sum_of["correct"],
        "loss/negative": -sum_of["incorrect"],
        "loss/kl": -sum_of["k1"] if config.kl_kind == "k1_reversed" else sum_of[config.kl_kind],
        "policy/reference_kl": sum_of["k1"],
        "policy/entropy_estimate": -sum_of["logp"],
        "weights/correct_mean": sum_of["correct_weight"],
        "weights/incorrect_mean": sum_of["incorrect_weight"],
    }
    tokens = metric_tokens(counts, config)
    means = {name: value / tokens[name] for name, value in sum_of_metric.items() if tokens[name]}
    return {"loss/total": total.detach(), **means}


def reward_model(
    score_T: Tensor, micro_batch: MicroBatch, counts: Counts, config: Config
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the cross entropy of the outcome's belief, and metrics.

    The belief is sigmoid(mean token score) (Eq. 12), or with reward_model.objective="prefix" that of `weights.belief`
    at every token, averaged over the sequence.
    """
    arguments = (score_T, micro_batch.action_offsets, micro_batch.reward, counts.sequences)
    if config.reward_model.objective == "prefix":
        total, hits = oreal_kernels.prefix_reward_loss(*arguments, config.weights.belief)
    else:
        total, hits = oreal_kernels.reward_loss(*arguments)
    # The guard sees an infinite score in its mean even where the loss stays finite.
    mean = score_T.detach().sum() / max(counts.action_tokens, 1)
    return total, {"loss/reward_model": total.detach(), "reward_model/accuracy": hits, "reward_model/score_mean": mean}


def supervised(logp_T: Tensor, counts: Counts) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the mean negative log-likelihood of the demonstrated tokens, for `oreal sft`, and metrics."""
    total = -logp_T.sum() / max(counts.action_tokens, 1)
    return total, {"loss/total": total.detach()}

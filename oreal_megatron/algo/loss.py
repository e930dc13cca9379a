"""The losses. Each is a plain sum over one micro-batch, divided by counts of the whole step: micro-batches and
data-parallel ranks simply add.

    right answers:  - positive_coef  sum_t w_t A log pi(a_t) / right tokens      behaviour cloning (Eq. 11, first term)
    wrong answers:  - negative_coef  sum_t w_t A r_t / wrong tokens              policy gradient (Eq. 11, second term)
    all answers:      kl_coef        sum_t KL(d_t) / action tokens               d = log reference - log pi

KL(d) estimates KL(pi || reference) in nats from a sampled token: k1 is -d; k1_reversed d, the sign of the authors'
"kl", which raises the log-prob of every sampled token; k2 d^2 / 2; k3 exp(d) - d - 1, never negative.

Where the authors' released code differs from the paper we follow the code, which gave the published results: rewards
are +1 and -1, the imitation term is multiplied by the advantage, the negative term's ratio r = exp(logp -
logp.detach()) is identically 1, and the KL is taken to the fixed SFT reference, on every kept token of right and wrong
answers alike. The arithmetic is in oreal_kernels; here the step's records become its terms and metrics.
"""

from __future__ import annotations

import oreal_kernels
from torch import Tensor

from oreal_megatron.config import LossConfig
from oreal_megatron.records import Counts, MicroBatch


def terms(
    reference_logp_T: Tensor, weight_T: Tensor, micro_batch: MicroBatch, counts: Counts, config: LossConfig
) -> oreal_kernels.Terms:
    """All of a micro-batch's loss that does not depend on the policy."""
    return oreal_kernels.Terms(
        reference_logp=reference_logp_T,
        weight=weight_T,
        cu_seqlens=micro_batch.action_offsets,
        reward=micro_batch.reward,
        advantage=micro_batch.advantage,
        correct_tokens=counts.correct_tokens,
        incorrect_tokens=counts.incorrect_tokens,
        action_tokens=counts.action_tokens,
        positive_coef=config.positive_coef,
        negative_coef=config.negative_coef,
        kl_coef=config.kl_coef,
        kl_kind=config.kl_kind,
        advantage_on_positives=config.advantage_on_positives,
    )


def metrics(total: Tensor, sums: Tensor, counts: Counts, kl_kind: str) -> dict[str, Tensor]:
    """The parts of the loss, and what else one wants to see of a step; they add up over micro-batches."""
    of = dict(zip(oreal_kernels.SUMS, sums, strict=True))
    right, wrong, tokens = (max(n, 1) for n in (counts.correct_tokens, counts.incorrect_tokens, counts.action_tokens))
    return {
        "loss/total": total.detach(),
        "loss/positive": -of["right"] / right,
        "loss/negative": -of["wrong"] / wrong,
        "loss/kl": (-of["k1"] if kl_kind == "k1_reversed" else of[kl_kind]) / tokens,
        "policy/reference_kl": of["k1"] / tokens,
        "policy/entropy_estimate": -of["logp"] / tokens,
        "weights/right_mean": of["right_weight"] / right,
        "weights/wrong_mean": of["wrong_weight"] / wrong,
    }


def reward_model(score_T: Tensor, micro_batch: MicroBatch, counts: Counts) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross entropy of sigmoid(mean token score) against right or wrong (paper, Eq. 12), over all sequences."""
    total, hits = oreal_kernels.reward_loss(score_T, micro_batch.action_offsets, micro_batch.reward, counts.sequences)
    mean = score_T.detach().sum() / max(
        counts.action_tokens, 1
    )  # an infinite score shows, whatever the loss makes of it
    return total, {"loss/reward_model": total.detach(), "reward_model/accuracy": hits, "reward_model/score_mean": mean}


def supervised(logp_T: Tensor, counts: Counts) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean negative log-likelihood of the demonstrated tokens, for `oreal sft`."""
    total = -logp_T.sum() / max(counts.action_tokens, 1)
    return total, {"loss/total": total.detach()}

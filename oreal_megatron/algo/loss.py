"""The losses. Each is a plain sum over one micro-batch, divided by counts of the whole step: micro-batches and
data-parallel ranks simply add.

Where the authors' released code differs from the paper we follow the code, which gave the published results: rewards
are +1 and -1, the imitation term is multiplied by the advantage, the negative term's ratio is identically 1, and the
KL is taken to the fixed SFT reference, on every kept token of right and wrong answers alike.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from oreal_megatron.algo import segments
from oreal_megatron.config import Loss
from oreal_megatron.records import Counts, MicroBatch


def imitate_right(logp_T: Tensor, weight_T: Tensor, is_right_T: Tensor, counts: Counts) -> Tensor:
    """Behaviour cloning on right answers:  - sum_t w_t log pi(a_t) / right tokens  (paper, Eq. 11, first term)."""
    return -torch.where(is_right_T, weight_T * logp_T, 0.0).sum() / max(counts.right_tokens, 1)


def push_from_wrong(logp_T: Tensor, weight_T: Tensor, is_right_T: Tensor, counts: Counts) -> Tensor:
    """Policy gradient on wrong answers:  - sum_t r_t w_t / wrong tokens  (paper, Eq. 11, second term).

    The ratio r = exp(logp - logp.detach()) is 1; only its gradient, that of log pi, matters.
    """
    ratio_T = torch.exp(logp_T - logp_T.detach())
    return -torch.where(is_right_T, 0.0, ratio_T * weight_T).sum() / max(counts.wrong_tokens, 1)


def kl_estimate(logp_T: Tensor, reference_logp_T: Tensor, kind: str) -> Tensor:
    """[T] estimates of KL(pi || reference) from sampled tokens, in nats; d = log reference - log pi.

    k1: -d; k1_reversed: d, the sign of the authors' "kl"; k2: d^2 / 2; k3: exp(d) - d - 1, never negative.
    """
    difference_T = reference_logp_T - logp_T
    if kind == "k1":
        return -difference_T
    if kind == "k1_reversed":
        return difference_T
    if kind == "k2":
        return difference_T.square() / 2
    if kind == "k3":
        return torch.exp(difference_T) - difference_T - 1
    raise ValueError(f"kl_kind is {kind!r}; wanted k1, k1_reversed, k2 or k3")


def policy(
    logp_T: Tensor, reference_logp_T: Tensor, weight_T: Tensor, micro_batch: MicroBatch, counts: Counts, config: Loss
) -> tuple[Tensor, dict[str, Tensor]]:
    """OREAL's total loss of one micro-batch (paper, Eq. 11) and its parts, which add up over micro-batches."""
    owner_T = micro_batch.sequence_of_token
    is_right_T = (micro_batch.reward > 0)[owner_T]
    advantage_T = micro_batch.advantage[owner_T]
    imitation_weight_T = weight_T * advantage_T if config.advantage_on_positives else weight_T
    right = imitate_right(logp_T, imitation_weight_T, is_right_T, counts)
    wrong = push_from_wrong(logp_T, advantage_T * weight_T, is_right_T, counts)
    kl = kl_estimate(logp_T, reference_logp_T, config.kl_kind).sum() / max(counts.action_tokens, 1)
    total = config.positive_coef * right + config.negative_coef * wrong + config.kl_coef * kl
    with torch.no_grad():
        tokens = max(counts.action_tokens, 1)
        parts = {
            "loss/total": total,
            "loss/positive": right,
            "loss/negative": wrong,
            "loss/kl": kl,
            "policy/reference_kl": (logp_T - reference_logp_T).sum() / tokens,
            "policy/entropy_estimate": -logp_T.sum() / tokens,
            "weights/right_mean": weight_T[is_right_T].sum() / max(counts.right_tokens, 1),
            "weights/wrong_mean": weight_T[~is_right_T].sum() / max(counts.wrong_tokens, 1),
        }
    return total, {name: value.detach() for name, value in parts.items()}


def reward_model(score_T: Tensor, micro_batch: MicroBatch, counts: Counts) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross entropy of sigmoid(mean token score) against right or wrong (paper, Eq. 12), over all sequences."""
    real = micro_batch.reward != 0  # [B]
    mean = segments.mean(score_T.float(), micro_batch.cu_seqlens)[real]
    target = (micro_batch.reward[real] > 0).float()
    total = F.binary_cross_entropy_with_logits(mean, target, reduction="sum") / max(counts.sequences, 1)
    accuracy = ((mean > 0) == (target > 0)).sum() / max(counts.sequences, 1)
    return total, {"loss/reward_model": total.detach(), "reward_model/accuracy": accuracy}


def supervised(logp_T: Tensor, counts: Counts) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean negative log-likelihood of the demonstrated tokens, for `oreal sft`."""
    total = -logp_T.sum() / max(counts.action_tokens, 1)
    return total, {"loss/total": total.detach()}

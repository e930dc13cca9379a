"""Cross entropy of a sequence's mean token score against its outcome (Eq. 12 of arXiv 2502.06781).

d loss / d score is (sigmoid(mean) - [correct]) / (length x sequences): one number per sequence.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from oreal_kernels import input_checks
from oreal_kernels.scores_to_weights import sequence_of_token, token_weights


def reference(scores: Tensor, cu_seqlens: Tensor, reward: Tensor, sequences: int) -> tuple[Tensor, Tensor]:
    """Compute the same sequence by sequence, differentiated by torch."""
    loss, hits = scores.sum() * 0, reward.new_zeros(())
    for sequence, outcome in enumerate(reward.tolist()):
        own_scores = scores[int(cu_seqlens[sequence]) : int(cu_seqlens[sequence + 1])]
        if outcome and len(own_scores):
            mean = own_scores.to(torch.promote_types(scores.dtype, torch.float32)).mean()
            loss = loss + F.binary_cross_entropy_with_logits(mean, (mean * 0 + (outcome > 0))) / max(sequences, 1)
            hits += float((mean > 0) == (outcome > 0))
    return loss, hits / max(sequences, 1)


class _RewardLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores, cu_seqlens, reward, sequences):
        length = cu_seqlens.diff()
        correct, real = reward > 0, (reward != 0) & (length > 0)
        _, mean = token_weights(scores, cu_seqlens, correct, (0.0, 0.0))
        divisor = max(sequences, 1)
        loss = F.binary_cross_entropy_with_logits(mean, correct.float(), weight=real.float(), reduction="sum") / divisor
        hits = (real & ((mean > 0) == correct)).sum() / divisor
        slope = torch.where(real, (torch.sigmoid(mean) - correct.float()) / (length.clamp(min=1) * divisor), 0)
        ctx.save_for_backward(slope[sequence_of_token(cu_seqlens, len(scores))].to(scores.dtype))
        ctx.mark_non_differentiable(hits)
        return loss, hits

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, _):
        (slope,) = ctx.saved_tensors
        return slope * grad_loss, None, None, None


def reward_loss(scores: Tensor, cu_seqlens: Tensor, reward: Tensor, sequences: int) -> tuple[Tensor, Tensor]:
    """Compute the reward model's loss and accuracy; both are shares of the step, so that micro-batches add up.

    Args:
        scores: [T] token scores, fp32 or bf16; differentiable.
        cu_seqlens: [B + 1] int64, cumulative lengths of the sequences, from 0 to T.
        reward: [B] above 0: correct, below 0: incorrect, 0: filler that does not count.
        sequences: sequences of the step over all ranks, the divisor.

    Returns:
        The loss and the share of sequences whose mean score has the sign of their outcome (scalars; the share is
        detached).

    Raises:
        ValueError: shapes do not fit, or cu_seqlens does not rise from 0 to T (on a GPU at a later call).
    """
    input_checks.check_length("reward", reward, input_checks.check_offsets(cu_seqlens, len(scores)))
    return _RewardLoss.apply(scores, cu_seqlens, reward, sequences)

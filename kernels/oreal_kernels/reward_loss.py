"""Cross entropy of a sequence's mean token score against right or wrong (Eq. 12 of arXiv 2502.06781).

d loss / d score is (sigmoid(mean) - [right]) / (length x sequences): one number per sequence.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from oreal_kernels.token_weights import owners, token_weights


def reference(scores: Tensor, cu_seqlens: Tensor, reward: Tensor, sequences: int) -> tuple[Tensor, Tensor]:
    """The same sequence by sequence, differentiated by torch."""
    loss, hits = scores.sum() * 0, reward.new_zeros(())
    for sequence, outcome in enumerate(reward.tolist()):
        own = scores[int(cu_seqlens[sequence]) : int(cu_seqlens[sequence + 1])]
        if outcome and len(own):
            mean = own.to(torch.promote_types(scores.dtype, torch.float32)).mean()
            loss = loss + F.binary_cross_entropy_with_logits(mean, (mean * 0 + (outcome > 0))) / max(sequences, 1)
            hits += float((mean > 0) == (outcome > 0))
    return loss, hits / max(sequences, 1)


class _RewardLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores, cu_seqlens, reward, sequences):
        length = cu_seqlens.diff()
        right, real = reward > 0, (reward != 0) & (length > 0)
        _, mean = token_weights(scores, cu_seqlens, right, 0.0)
        counted = max(sequences, 1)
        loss = F.binary_cross_entropy_with_logits(mean, right.float(), weight=real.float(), reduction="sum") / counted
        hits = (real & ((mean > 0) == right)).sum() / counted
        slope = torch.where(real, (torch.sigmoid(mean) - right.float()) / (length.clamp(min=1) * counted), 0)
        ctx.save_for_backward(slope[owners(cu_seqlens, len(scores))].to(scores.dtype))
        ctx.mark_non_differentiable(hits)
        return loss, hits

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, _):
        (slope,) = ctx.saved_tensors
        return slope * grad_loss, None, None, None


def reward_loss(
    scores: Tensor,  # [T]
    cu_seqlens: Tensor,  # [B + 1]
    reward: Tensor,  # [B]: > 0 right, < 0 wrong, 0 no answer
    sequences: int,  # of the whole step
) -> tuple[Tensor, Tensor]:
    """Loss and share of sequences judged rightly, each divided by `sequences` so that micro-batches add up."""
    return _RewardLoss.apply(scores, cu_seqlens, reward, sequences)

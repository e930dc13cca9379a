"""Cross entropy of the belief at every token against the outcome: each prefix learns how its sequence ends.

With beliefs of running means this is the objective of arXiv 2604.13197 (length-normalised prefix values) for a scalar
head, without its margin; here every sequence counts alike, there every token. It costs a few passes over [T] numbers:
torch serves every device, and there is no kernel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from oreal_kernels import input_checks
from oreal_kernels.scores_to_weights import BELIEFS, sequence_of_token


def reference(scores: Tensor, cu_seqlens: Tensor, reward: Tensor, sequences: int, belief: str) -> tuple[Tensor, Tensor]:
    """Compute the same sequence by sequence, differentiated by torch."""
    loss, hits = scores.sum() * 0, reward.new_zeros(())
    for sequence, outcome in enumerate(reward.tolist()):
        own_scores = scores[int(cu_seqlens[sequence]) : int(cu_seqlens[sequence + 1])]
        if outcome and len(own_scores):
            own_scores = own_scores.to(torch.promote_types(scores.dtype, torch.float32))
            position = torch.arange(1, len(own_scores) + 1, device=scores.device)
            values = own_scores.cumsum(0) / position if belief == "prefix_mean" else own_scores
            target = torch.full_like(values, outcome > 0)
            loss = loss + F.binary_cross_entropy_with_logits(values, target) / max(sequences, 1)
            hits += float((own_scores.mean() > 0) == (outcome > 0))
    return loss, hits / max(sequences, 1)


class _PrefixRewardLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores, cu_seqlens, reward, sequences, belief):
        length, divisor = cu_seqlens.diff(), max(sequences, 1)
        owner = sequence_of_token(cu_seqlens, len(scores))
        position = torch.arange(len(scores), device=scores.device) - cu_seqlens[owner] + 1  # from 1
        total = _sums_before(scores.double())
        before = total[cu_seqlens[:-1]]
        values = (total[1:] - before[owner]) / position if belief == "prefix_mean" else scores.double()
        correct, real = reward > 0, (reward != 0) & (length > 0)
        share = (real / (length.clamp(min=1) * divisor)).double()[owner]  # of a token in the loss
        target = correct[owner].double()
        loss = F.binary_cross_entropy_with_logits(values, target, weight=share, reduction="sum").float()
        mean = (total[cu_seqlens[1:]] - before) / length.clamp(min=1)
        hits = (real & ((mean > 0) == correct)).sum() / divisor
        slope = (torch.sigmoid(values) - target) * share
        if belief == "prefix_mean":  # a score is in the means of its own and of all later tokens of the sequence
            later = _sums_before(slope / position)
            slope = later[cu_seqlens[owner + 1]] - later[:-1]
        ctx.save_for_backward(slope.to(scores.dtype))
        ctx.mark_non_differentiable(hits)
        return loss, hits

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, _):
        (slope,) = ctx.saved_tensors
        return slope * grad_loss, None, None, None, None


def _sums_before(values: Tensor) -> Tensor:
    """Return the sums [T + 1] of the values before each one, and of all."""
    return torch.cat([values.new_zeros(1), values.cumsum(0)])


def prefix_reward_loss(
    scores: Tensor, cu_seqlens: Tensor, reward: Tensor, sequences: int, belief: str
) -> tuple[Tensor, Tensor]:
    """Compute the loss and the accuracy of `reward_loss`, with the cross entropy at every token instead of the mean.

    A sequence's cross entropy is the mean over its tokens of that of sigmoid(v), where v is the mean of the scores up
    to the token (belief "prefix_mean") or the token's score ("token"). Arguments and results: see `reward_loss`.

    Raises:
        ValueError: an unknown belief; otherwise as `reward_loss`.
    """
    if belief not in BELIEFS:
        raise ValueError(f"belief is {belief!r}; expected one of {', '.join(BELIEFS)}")
    input_checks.check_length("reward", reward, input_checks.check_offsets(cu_seqlens, len(scores)))
    return _PrefixRewardLoss.apply(scores, cu_seqlens, reward, sequences, belief)

"""Log-probabilities of labels from vocabulary-parallel logits: the local part, without communication.

Each rank computes three numbers per token from its slice of the vocabulary; the ranks exchange them in one
all-gather and combine them in rank order, so that all ranks hold bitwise equal results.
"""

from __future__ import annotations

import torch
from torch import Tensor


def statistics(logits: Tensor, labels: Tensor, vocab_start: int, vocab_size: int) -> Tensor:
    """[3, T] fp32 of one rank's logits [T, V/tp]: maximum, sum of exp(logit - maximum), and the label's logit (0 where
    another rank holds it). Columns from `vocab_size` on are padding."""
    logits = logits.float()[:, : max(vocab_size - vocab_start, 0)]
    if logits.shape[1] == 0:  # this rank holds only padding
        empty = logits.new_zeros(3, len(labels))
        empty[0] = -torch.inf
        return empty
    maximum = logits.amax(1)
    column = labels - vocab_start
    mine = (column >= 0) & (column < logits.shape[1])
    target = logits.gather(1, column.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
    return torch.stack([maximum, torch.exp(logits - maximum[:, None]).sum(1), torch.where(mine, target, 0.0)])


def combine(parts: Tensor) -> tuple[Tensor, Tensor]:
    """log-prob [T] and log-sum-exp [T] from all ranks' statistics [tp, 3, T]."""
    maxima, sums, targets = parts.unbind(1)
    maximum = maxima.amax(0)
    log_normaliser = torch.log((sums * torch.exp(maxima - maximum)).sum(0))
    # The maximum goes first: added to a logarithm it would cost digits.
    return targets.sum(0) - maximum - log_normaliser, maximum + log_normaliser


def gradient(
    logits: Tensor, labels: Tensor, log_sum_exp: Tensor, grad: Tensor, vocab_start: int, vocab_size: int
) -> Tensor:
    """d(log-prob)/d(logits) x grad [T] for one rank's slice: (one-hot - softmax) x grad, zero on padding."""
    result = torch.exp(logits.float() - log_sum_exp[:, None]).neg_()
    result[:, max(vocab_size - vocab_start, 0) :] = 0
    column = labels - vocab_start
    rows = torch.nonzero((column >= 0) & (column < logits.shape[1]))[:, 0]
    result[rows, column[rows]] += 1
    return (result * grad[:, None]).to(logits.dtype)

"""Token importance from the token-level reward model's scores (paper, Eq. 10; the authors' prefix mean)."""

from __future__ import annotations

import torch
from torch import Tensor

from oreal_megatron.algo import segments
from oreal_megatron.config import Weights
from oreal_megatron.records import MicroBatch


def importance(score_T: Tensor, micro_batch: MicroBatch, config: Weights) -> Tensor:
    """[T] weights in [0, 1], detached.

    The belief that the answer so far is right is sigmoid(running mean of the scores); right answers are weighted by
    it, wrong ones by its complement. `threshold` maps [threshold, 1] to [0, 1] and the rest to 0: with 0.5 that is
    max(2 sigmoid(w) - 1, 0) and max(1 - 2 sigmoid(w), 0) of Eq. 10.
    """
    belief_T = torch.sigmoid(segments.running_mean(score_T.detach().float(), micro_batch.cu_seqlens))
    is_right_T = (micro_batch.reward > 0)[micro_batch.sequence_of_token]
    merit_T = torch.where(is_right_T, belief_T, 1 - belief_T)
    if config.rescale == "threshold":
        return ((merit_T - config.threshold) / (1 - config.threshold)).clamp(0, 1)
    return _top_share(merit_T, micro_batch.cu_seqlens, config.top_share)


def _top_share(merit_T: Tensor, cu_seqlens: Tensor, share: float) -> Tensor:
    """The best `share` of each sequence's tokens, spread over [0, 1] (all 1 when they are equal); the rest 0."""
    weight_T = torch.zeros_like(merit_T)
    for start, stop in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        top, where = torch.topk(merit_T[start:stop], int((stop - start) * share))
        if len(top):
            spread = top.max() - top.min()
            weight_T[start + where] = (top - top.min()) / spread if spread > 0 else torch.ones_like(top)
    return weight_T

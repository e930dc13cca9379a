"""Token importance from the token-level reward model's scores (paper, Eq. 10; the authors' prefix mean)."""

from __future__ import annotations

import oreal_kernels
import torch
from torch import Tensor

from oreal_megatron.config import WeightsConfig
from oreal_megatron.records import MicroBatch


def importance(score_T: Tensor, micro_batch: MicroBatch, config: WeightsConfig) -> Tensor:
    """[T] weights in [0, 1], detached.

    The belief that the answer so far is right is sigmoid(running mean of the scores); right answers are weighted by
    it, wrong ones by its complement. `threshold` maps [threshold, 1] to [0, 1] and the rest to 0: with 0.5 that is
    max(2 sigmoid(w) - 1, 0) and max(1 - 2 sigmoid(w), 0) of Eq. 10.
    """
    by_threshold = config.rescale == "threshold"
    is_right = micro_batch.reward > 0
    weight_T, _ = oreal_kernels.token_weights(
        score_T, micro_batch.action_offsets, is_right, config.threshold if by_threshold else 0.0
    )
    return weight_T if by_threshold else _top_share(weight_T, micro_batch.action_offsets, config.top_share)


def _top_share(merit_T: Tensor, action_offsets: Tensor, share: float) -> Tensor:
    """The best `share` of each sequence's tokens, spread over [0, 1] (all 1 when they are equal); the rest 0."""
    weight_T = torch.zeros_like(merit_T)
    for start, stop in zip(action_offsets[:-1].tolist(), action_offsets[1:].tolist(), strict=True):
        top, where = torch.topk(merit_T[start:stop], int((stop - start) * share))
        if len(top):
            spread = top.max() - top.min()
            weight_T[start + where] = (top - top.min()) / spread if spread > 0 else torch.ones_like(top)
    return weight_T
